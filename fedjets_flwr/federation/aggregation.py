"""How the clients' vectors become the next ones: the running mean, and robust rules, each per vector.

Every expert and the gate is combined by itself, over the clients that trained it. A vector that nobody sent is absent
from the result, so the old one stays bit-identical.
"""

import hashlib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, MutableMapping
from typing import Protocol

import torch
from torch import Tensor

from fedjets_flwr.config.sections import Aggregation

log = logging.getLogger("flwr")


class Aggregator(Protocol):
    """Takes vectors one at a time, in client-id order, and gives the combined ones."""

    counts: dict[str, int]

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Take one client's vector with a weight >= 0; one of weight 0 has no say."""

    def result(self) -> dict[str, Tensor]:
        """Return the combined vectors by name."""


class RunningMeans:
    """Weighted means of named vectors; holds one sum per name, whatever the number of replies.

    ``sum_i w_i v_i / sum_i w_i`` (FedAvg, McMahan et al. 2017, Algorithm 1), accumulated in the order of the calls in
    float32. Weights count in units of the first one, so that the mean of a single vector is that vector, bit for bit.
    """

    def __init__(self, spare: MutableMapping[str, Tensor] | None = None) -> None:
        """Begin; the sums are made in the memory of ``spare`` vectors, which nobody may read any more, and they go."""
        self._spare = {} if spare is None else spare
        self.counts: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._units: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Fold in one client's vector."""
        if weight == 0:
            return
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self._sums and weight > 1e6 * self._units[name]:
            shrink = self._units[name] / weight  # the first weight was tiny: count in units of this one
            self._sums[name].mul_(shrink)
            self._weights[name] *= shrink
            self._units[name] = weight
        if name in self._sums:
            share = weight / self._units[name]
            self._sums[name].add_(vector, alpha=share)
            self._weights[name] += share
        else:
            memory = self._spare.pop(name, None)
            # A new object for a new vector: who knew the old one by its identity must not mistake the two.
            self._sums[name] = vector.clone() if memory is None else memory.detach().copy_(vector)
            self._units[name], self._weights[name] = weight, 1.0

    def result(self) -> dict[str, Tensor]:
        """Return the means; the sums become them in place, and nothing can be added any more."""
        while self._weights:
            name, weight = self._weights.popitem()
            self._sums[name].div_(weight)
        return dict(self._sums)


class PooledMeans:
    """Weighted means whose batch-norm variances are those of all clients' samples together.

    A running variance is around its own client's mean. The mean of the variances leaves out how far those means lie
    apart; by the law of total variance ``Var = E[var_i] + E[m_i^2] - E[m_i]^2``, all E weighted like the vectors.
    """

    def __init__(self, means: Mapping[str, Tensor], variances: Mapping[str, Tensor], inner: RunningMeans) -> None:
        """Begin.

        Args:
            means: positions of the running means in each vector that has some, (k,) int64.
            variances: of the running variances, in the same order.
            inner: what averages the vectors.
        """
        self._means, self._variances, self._inner = means, variances, inner
        self._squares, self.counts = RunningMeans(), inner.counts

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Fold in one client's vector."""
        self._inner.add(name, vector, weight)
        if name in self._means:
            self._squares.add(name, vector[self._means[name]].square(), weight)

    def result(self) -> dict[str, Tensor]:
        """Return the means, the variances pooled; nothing can be added any more."""
        combined = self._inner.result()
        for name, squares in self._squares.result().items():
            between = (squares - combined[name][self._means[name]].square()).clamp_min(0.0)  # 0 but for rounding
            combined[name][self._variances[name]] += between
        self._squares = RunningMeans()
        return combined


class Robust:
    """A robust rule on the updates ``v_i - v`` of each vector; holds all updates until the end of the round.

    Where a rule needs more clients than hold a vector, norm clipping takes its place; the log says so.
    """

    def __init__(self, old: Mapping[str, Tensor], settings: Aggregation) -> None:
        self.counts: dict[str, int] = {}
        self._old, self._settings = old, settings
        self._updates: dict[str, list[Tensor]] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Hold one client's update; all count the same, since a weight is what a client says of itself."""
        if weight == 0:
            return
        self.counts[name] = self.counts.get(name, 0) + 1
        self._updates.setdefault(name, []).append(vector - self._old[name])

    def result(self) -> dict[str, Tensor]:
        """Return old + combined update."""
        bounds = self.bounds()
        return {
            name: self._old[name] + self._combine(name, torch.stack(held), bounds[name])
            for name, held in self._updates.items()
        }

    def bounds(self) -> dict[str, float]:
        """Return the norm to which the updates of each vector are cut.

        One client's own norm is no bound: experts share the (low) median norm of all experts' updates.
        """
        norms: dict[str, list[float]] = {}
        for name, held in self._updates.items():
            norms.setdefault(name.split(".")[0], []).extend(float(update.norm()) for update in held)
        medians = {kind: max(statistics.median_low(found), 1e-12) for kind, found in norms.items()}
        given, times = self._settings.clip_norm, self._settings.clip_times
        return {name: given or times * medians[name.split(".")[0]] for name in self._updates}

    def _combine(self, name: str, updates: Tensor, bound: float) -> Tensor:
        settings = self._settings.model_copy(update={"clip_norm": bound})
        rule, needed = RULES[settings.rule], clients_needed(settings)
        if len(updates) < needed:
            log.info("%s: %s needs %d clients, %d came: clipping", name, settings.rule, needed, len(updates))
            rule = clipped_mean
        return rule(updates, settings)


Rule = Callable[[Tensor, Aggregation], Tensor]
"""Updates (n, d) of one vector and the settings -> the combined one, (d,)."""


def clients_needed(settings: Aggregation) -> int:
    """Return with how many clients the rule can outvote one bad client (Krum: ``aggregation.byzantine`` of them)."""
    return {"median": 3, "trimmed-mean": 3, "krum": 2 * settings.byzantine + 3}.get(settings.rule, 1)


def clipped_mean(updates: Tensor, settings: Aggregation) -> Tensor:
    """Return the mean of updates (n, d) cut to the norm ``aggregation.clip-norm``; 0: ``clip-times`` their median."""
    bound = settings.clip_norm or settings.clip_times * float(updates.norm(dim=1).median())
    mean: Tensor = (clip_shares(updates, bound).div(len(updates)).float().unsqueeze(1) * updates).sum(dim=0)
    return mean


def clip_shares(updates: Tensor, bound: float) -> Tensor:
    """Return what is left of each of n updates (n, d) that are cut to a norm, (n,) float64 of at most 1."""
    shares: Tensor = bound / updates.norm(dim=1).double().clamp_min(1e-12)
    return shares.clamp(max=1.0)


def coordinate_median(updates: Tensor, settings: Aggregation) -> Tensor:
    """Return the coordinate-wise median (Yin et al. 2018), for even numbers the mean of the middle two."""
    ordered, middle = updates.sort(dim=0).values, len(updates) // 2
    return ordered[middle] if len(updates) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def trimmed_mean(updates: Tensor, settings: Aggregation) -> Tensor:
    """Return the mean without a share ``aggregation.trim`` at both ends of a coordinate, one at least."""
    cut = min(max(1, int(settings.trim * len(updates))), (len(updates) - 1) // 2)
    return updates.sort(dim=0).values[cut : len(updates) - cut].mean(dim=0)


def krum(updates: Tensor, settings: Aggregation) -> Tensor:
    """Return the update that is closest to its n - f - 2 nearest neighbours (Blanchard et al. 2017)."""
    distances = torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.sort(dim=1).values[:, 1 : len(updates) - settings.byzantine - 1]
    return updates[nearest.sum(dim=1).argmin()]


RULES: dict[str, Rule] = {
    "clip": clipped_mean,
    "median": coordinate_median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "validated": clipped_mean,  # of what the judge let pass (judge.py)
}


def bounded_weights(samples: Mapping[int, int], times: float) -> dict[int, float]:
    """Return each client's samples as a weight, at most ``times`` the clients' median; 0: as they are."""
    bound = times * statistics.median(samples.values()) if samples and times else math.inf
    return {client: float(min(count, bound)) for client, count in samples.items()}


def grew(new: Tensor, old: Tensor, times: float) -> bool:
    """Return whether a vector became over ``times`` as long as it was, or as 1 if that was shorter; 0: never."""
    length = float(new.norm())
    return length > times > 0 and length > times * float(old.norm())


def make_aggregator(
    settings: Aggregation, old: Mapping[str, Tensor], spare: MutableMapping[str, Tensor] | None = None
) -> Aggregator:
    """Return the aggregator of the settings for one round that starts from the vectors ``old``.

    ``spare``: vectors whose memory may be used again.
    """
    return RunningMeans(spare) if settings.rule == "mean" else Robust(old, settings)


def weights_hash(vectors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over all vectors in the order of their names: equal if and only if the bits are."""
    hasher = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        hasher.update(name.encode())
        hasher.update(vector.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def all_finite(vector: Tensor) -> bool:
    """Return whether the vector has no NaN and no infinity."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())
