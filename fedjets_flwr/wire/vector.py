"""A model as one flat float32 vector.

The vector holds the parameters, then the floating-point buffers (batch-norm running statistics), each in the order of
the module. Batch-norm policy: running statistics are averaged with the weights. Integer buffers do not travel: the
only ones here, ``num_batches_tracked``, have no influence while batch norm has a fixed momentum.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of what a vector holds, in order; ``trained`` entries come first."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    trained: int

    @cached_property
    def size(self) -> int:
        """Number of floats."""
        return sum(torch.Size(shape).numel() for _, shape in self.entries)

    @cached_property
    def digest(self) -> str:
        """Short SHA-256, equal on both sides of the wire if and only if they mean the same vector."""
        return hashlib.sha256(repr((self.entries, self.trained)).encode()).hexdigest()[:16]


class FlatModel:
    """A module whose parameters and float buffers are views of one vector.

    Loading and reading the module are then one copy each, and an optimiser step touches one tensor.

    Attributes:
        module: the module itself.
        layout: what the vector holds.
        vector: all floats, (layout.size,).
        weights: the trained part of the vector as one parameter; its gradient is shared with the module's.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = list(module.named_parameters())
        buffers = [(name, b) for name, b in module.named_buffers() if b.is_floating_point()]
        entries = tuple((name, tuple(t.shape)) for name, t in [*parameters, *buffers])
        trained = sum(p.numel() for _, p in parameters)
        self.module = module
        self.layout = Layout(entries, trained)
        self.vector = torch.cat([t.detach().flatten().float() for _, t in [*parameters, *buffers]])
        self.weights = nn.Parameter(self.vector[:trained])
        gradient = torch.zeros_like(self.weights)
        self.weights.grad = gradient
        start = 0
        for _, p in parameters:
            stop = start + p.numel()
            p.data = self.vector[start:stop].view_as(p)
            p.grad = gradient[start:stop].view_as(p)
            start = stop
        for name, b in buffers:
            owner, _, leaf = name.rpartition(".")
            stop = start + b.numel()
            setattr(module.get_submodule(owner), leaf, self.vector[start:stop].view_as(b))
            start = stop

    @torch.no_grad()
    def load(self, vector: Tensor) -> None:
        """Overwrite all floats in place."""
        self.vector.copy_(vector)

    def zero_grad(self) -> None:
        """Set all gradients to zero in place."""
        assert self.weights.grad is not None
        self.weights.grad.zero_()
