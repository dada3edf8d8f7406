"""Choosing anchor clients by what the common expert sees in their data, where no partition made any.

Anchors drive the specialisation of experts (FedJETs, section 4), so their data should differ. The server sees each
client's mean embedding alone, no label and no sample.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedjets_flwr.errors import FedjetsError


def select_anchors(means: Mapping[int, Tensor], count: int, how: str, seed: int) -> tuple[int, ...]:
    """Return ``count`` client ids in ascending order; the m-th is the anchor of expert m.

    Args:
        means: mean common-expert embedding (d,) of each training client that could be prepared.
        count: M.
        how: a key of :data:`SELECTIONS`.
        seed: of the clustering's draws.

    Raises:
        FedjetsError: there are fewer clients than anchors.
    """
    if len(means) < count:
        raise FedjetsError(f"moe.experts = {count}: only {len(means)} clients could be prepared; lower it")
    clients = sorted(means)
    points = bounded(torch.stack([means[client] for client in clients]).double())
    return tuple(sorted(clients[row] for row in SELECTIONS[how](points, count, seed)))


def bounded(points: Tensor, times: float = 3.0) -> Tensor:
    """Return points (n, d) no farther from their median than ``times`` the median of those distances.

    A client tells its own mean; one that lies far out would be an anchor whatever it holds.
    """
    centre = points.median(dim=0).values
    away = points - centre
    distance = away.norm(dim=1, keepdim=True)
    if not (bound := times * distance.median()) > 0:  # most clients are alike
        return points
    return torch.where(distance > bound, centre + away * (bound / distance), points)


def _k_means(points: Tensor, count: int, seed: int) -> list[int]:
    """Return the row nearest to each centre of k-means."""
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=10, random_state=seed % 2**32).fit(points.numpy())
    groups = torch.from_numpy(fitted.labels_)
    distance = torch.cdist(points, torch.from_numpy(fitted.cluster_centers_))
    chosen = [int(distance[:, k].where(groups == k, torch.inf).argmin()) for k in range(count)]
    # Clients with equal embeddings leave a cluster empty: fill up with the others, farthest first.
    return _farthest_from(points, list(dict.fromkeys(chosen)), count)


def _farthest(points: Tensor, count: int, seed: int) -> list[int]:
    """Return the row farthest from the mean, then again and again the one farthest from all chosen ones."""
    first = int((points - points.mean(dim=0)).norm(dim=1).argmax())
    return _farthest_from(points, [first], count)


def _farthest_from(points: Tensor, chosen: list[int], count: int) -> list[int]:
    while len(chosen) < count:
        nearest = torch.cdist(points, points[chosen]).min(dim=1).values
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


SELECTIONS: dict[str, Callable[[Tensor, int, int], list[int]]] = {"k-means": _k_means, "farthest": _farthest}
"""Ways to choose: (points (n, d), count, seed) -> rows."""
