"""Per-vector weighted means, folded one reply at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Weighted means of named vectors; holds one sum per name, whatever the number of replies.

    ``sum_i w_i v_i / sum_i w_i`` (FedAvg, McMahan et al. 2017, Algorithm 1), accumulated in the order of the calls in
    float32. Weights count in units of the first one, so that the mean of a single vector is that vector, bit for bit.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._units: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Fold in one client's vector with a weight >= 0; one of weight 0 has no say."""
        if weight == 0:
            return
        if name in self._sums:
            share = weight / self._units[name]
            self._sums[name].add_(vector, alpha=share)
            self._weights[name] += share
        else:
            self._sums[name] = vector.clone()
            self._units[name], self._weights[name] = weight, 1.0

    def means(self) -> dict[str, Tensor]:
        """Return the means; a name that nobody sent is absent, so its old vector stays bit-identical."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}


def weights_hash(vectors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over all vectors in the order of their names: equal if and only if the bits are."""
    import hashlib

    hasher = hashlib.sha256()
    for name, vector in sorted(vectors.items()):
        hasher.update(name.encode())
        hasher.update(vector.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def all_finite(vector: Tensor) -> bool:
    """Return whether the vector has no NaN and no infinity."""
    return bool(torch.isfinite(vector.sum())) or bool(torch.isfinite(vector).all())
