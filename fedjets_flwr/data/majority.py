"""The split of Listo Zec et al. (2020): each client has two classes that make up most of its samples.

As in their code, but for two faults: there samples that stop the training were left in the pool, so that another
client could draw them, too, and one could be drawn twice.
"""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from fedjets_flwr.errors import FedjetsError


def class_pairs(
    num_classes: int, clients: int, how: str, rng: np.random.Generator, others: int = 0
) -> list[tuple[int, int]]:
    """Return the two majority classes of each client that trains, and of ``others``, as ``partition.pairs`` says.

    Raises:
        FedjetsError: there are too few classes.
    """
    pairs: list[tuple[int, int]]
    if how == "code":
        pairs = list(product(range(num_classes), range(num_classes)))
    elif how == "distinct":
        every = list(combinations(range(num_classes), 2))
        pairs = [every[i] for i in rng.permutation(len(every))]
    else:
        order = rng.permutation(num_classes).tolist()
        pairs = list(zip(order[::2], order[1::2], strict=False))
        if len(pairs) < clients:
            raise FedjetsError(
                f"partition.pairs = 'exclusive': {num_classes} classes make {len(pairs)} pairs, and there are"
                f" {clients} clients; set it to 'distinct'"
            )
    return [pairs[client % len(pairs)] for client in range(clients + others)]


class Urn:
    """Samples by class, from which clients draw."""

    def __init__(self, by_label: Sequence[np.ndarray], rng: np.random.Generator, put_back: bool) -> None:
        """Begin.

        Args:
            by_label: sample indices of each class.
            rng: of all draws.
            put_back: whether a client's samples are there for the next client, too.
        """
        self._left = [rng.permutation(found) for found in by_label]
        self._rng, self._put_back = rng, put_back

    def draw(self, pair: tuple[int, int], total: int, share: float) -> np.ndarray:
        """Return ``floor(share * total / 2)`` samples of each class of a pair, the rest of all other classes alike.

        Raises:
            FedjetsError: there are not enough.
        """
        each = int(share * total / 2 + 1e-9)
        counts = np.zeros(len(self._left), dtype=np.int64)
        sizes = np.array([0 if label in pair else len(found) for label, found in enumerate(self._left)])
        rest = total - 2 * each
        if sizes.sum() >= rest:
            counts += self._rng.multivariate_hypergeometric(sizes, rest)
        for label in pair:
            counts[label] += each
        if counts.sum() < total or any(count > len(found) for count, found in zip(counts, self._left, strict=True)):
            raise FedjetsError(
                f"partition.samples-per-client: no {total} samples of the classes {sorted(set(pair))} and others are"
                " left for a client; in the majority split clients share none; lower it, or partition.clients"
            )
        return np.sort(np.concatenate([self._take(label, int(count)) for label, count in enumerate(counts)]))

    def _take(self, label: int, count: int) -> np.ndarray:
        found = self._left[label]
        if self._put_back:
            return self._rng.choice(found, count, replace=False)
        self._left[label] = found[count:]
        return found[:count]
