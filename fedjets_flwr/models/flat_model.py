"""A model as one flat float32 vector.

The vector holds the parameters, then the floating-point buffers (batch-norm running statistics), each in the order of
the module. Batch-norm policy: running statistics travel with the weights; ``aggregation.bn`` says how they are
averaged. Integer buffers do not travel: the only ones here, ``num_batches_tracked``, have no influence while batch
norm has a fixed momentum.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VectorSpec:
    """Names and shapes of what a vector holds, in order; the first ``trained`` numbers are weights.

    Each vector has its own, under its full name: experts may differ in size.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    trained: int

    @classmethod
    def of(cls, module: nn.Module) -> "VectorSpec":
        """Return what the vector of a module holds, on whatever device it lies (``meta`` will do)."""
        named, buffers = list(module.named_parameters()), _float_buffers(module)
        entries = tuple((name, tuple(t.shape)) for name, t in [*named, *buffers])
        return cls(entries, sum(p.numel() for _, p in named))

    @classmethod
    def plain(cls, size: int) -> "VectorSpec":
        """Return the spec of ``size`` numbers that are no model's (a control variate, a mean)."""
        return cls((("", (size,)),), size)

    @cached_property
    def size(self) -> int:
        """Number of floats."""
        return sum(torch.Size(shape).numel() for _, shape in self.entries)

    def positions(self, leaf: str) -> Tensor:
        """Return where the entries of a name's last part lie, e.g. all ``running_var``, (k,) int64."""
        sizes = [torch.Size(shape).numel() for _, shape in self.entries]
        places = torch.arange(self.size).split(sizes)
        names = [name.rpartition(".")[2] for name, _ in self.entries]
        found = [place for name, place in zip(names, places, strict=True) if name == leaf]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    @cached_property
    def digest(self) -> str:
        """Short SHA-256, equal on both sides of the wire if and only if they mean the same vector."""
        return hashlib.sha256(repr((self.entries, self.trained)).encode()).hexdigest()[:16]


def digest_of(specs: Iterable[VectorSpec]) -> str:
    """Return one short digest of several layouts, in their order."""
    return hashlib.sha256(" ".join(spec.digest for spec in specs).encode()).hexdigest()[:16]


class FlatModel:
    """A module whose parameters and float buffers are views of one vector.

    Loading and reading the module are then one copy each. Gradients are not views of anything: autograd hands its own
    over, where it would have to add to memory of ours (a pass over all weights in every step).

    Attributes:
        module: the module itself.
        spec: what the vector holds.
        vector: all floats, (spec.size,).
        parameters: the module's parameters, in the order of the vector.
    """

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        buffers = _float_buffers(module)
        self.module, self.spec = module, VectorSpec.of(module)
        self.vector = torch.cat([t.detach().flatten().float() for _, t in [*named, *buffers]])
        self.parameters = [p for _, p in named]
        for p, view in zip(self.parameters, self.views(self.weights), strict=True):
            p.data = view
        start = self.spec.trained
        for name, b in buffers:
            owner, _, leaf = name.rpartition(".")
            stop = start + b.numel()
            setattr(module.get_submodule(owner), leaf, self.vector[start:stop].view_as(b))
            start = stop

    @property
    def weights(self) -> Tensor:
        """The trained part of the vector, (spec.trained,)."""
        return self.vector[: self.spec.trained]

    def views(self, values: Tensor) -> list[Tensor]:
        """Return parts of a vector (spec.trained,) in the shapes of the parameters."""
        parts = values.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @property
    def gradients(self) -> list[Tensor]:
        """The parameters' gradients, which may be changed in place; a parameter without one gets zeros."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Overwrite all floats in place."""
        self.vector.copy_(vector)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None


def _float_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, b) for name, b in module.named_buffers() if b.is_floating_point()]
