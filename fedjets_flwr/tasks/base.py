"""The contract of a task: all that the paper, the federation and the wire need to know of the samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fedjets_flwr.data.datasets import Spec
from fedjets_flwr.models.common_expert import CommonExpert

Inputs = Callable[[Tensor], Tensor]
"""Sample indices -> the models' input batch (augmented images, or cached trunk features)."""

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets of a batch -> a scalar."""


@dataclass(frozen=True)
class Losses:
    """Of a batch's outputs and targets: the mean that is trained on, and the sum that says when to stop."""

    mean: LossOf
    total: LossOf


@dataclass(frozen=True)
class Samples:
    """What one client holds, on the CPU unless moved.

    Attributes:
        client: its id.
        stored: n samples as they lie here, (n, ...), before any preprocessing: what an embedding is a function of.
        targets: (n, ...).
        labelled: whether the targets are known.
        training: false for an unseen client, whose targets, if known, only score.
        kinds: of each sample, (n,) int64, a position in ``Spec.kinds``; None: its target says it.
        per_byte: of text, tokens that stand for a byte; otherwise 0.
    """

    client: int
    stored: Tensor
    targets: Tensor
    labelled: bool
    training: bool
    kinds: Tensor | None = None
    per_byte: float = 0.0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def columns(self) -> Tensor:
        """What each sample is of, (n,) int64, as positions in ``Spec.columns``."""
        return self.targets if self.kinds is None else self.kinds

    def first(self, count: int) -> "Samples":
        """Return the first ``count`` samples, or all that there are."""
        kinds = None if self.kinds is None else self.kinds[:count]
        return replace(self, stored=self.stored[:count], targets=self.targets[:count], kinds=kinds)

    def to(self, device: torch.device) -> "Samples":
        """Return the same samples on a device."""
        kinds = None if self.kinds is None else self.kinds.to(device)
        return replace(self, stored=self.stored.to(device), targets=self.targets.to(device), kinds=kinds)


class Task(Protocol):
    """What a sample is and what a model's output says of it."""

    @property
    def spec(self) -> Spec:
        """Shape of a sample and names of the classes."""

    @property
    def classifies(self) -> bool:
        """Whether a sample is of one class: then a common expert embeds it, and clients that never train are scored.

        Otherwise those that train are.
        """

    @property
    def tells(self) -> tuple[str, ...]:
        """Numbers, none below 0, that a client tells of its own tests besides right answers (:meth:`told`)."""

    @property
    def scores(self) -> Mapping[str, tuple[str, ...]]:
        """By kind, the numbers from 0 to 1 that a client of it tells of what its model writes (:meth:`written`)."""

    @property
    def digest(self) -> str:
        """Of what all sites must have alike for samples to mean the same; empty: nothing."""

    @property
    def simulates(self) -> bool:
        """Whether the samples of all clients lie here, as in a simulation."""

    @property
    def has_global(self) -> bool:
        """Whether test samples that all clients share lie here."""

    def deal(self) -> None:
        """Give every client its samples, where they lie here.

        Raises:
            FedjetsError: the settings do not fit the samples.
        """

    def known(self, client: int) -> int:
        """Return how many samples a client has, where they lie here."""

    def sample_input(self) -> Tensor:
        """Return one sample of no content as a whole model reads it."""

    def samples(self, client: int, folder: Path | None = None, part: str = "train") -> Samples:
        """Return what a client holds.

        Args:
            client: its id.
            folder: of a deployed site's own samples.
            part: of a training client's, ``train``, ``val``, ``test`` or ``all``; ``shared``, ``shared-val``: what of
                ``train`` or ``val`` takes part in rounds; ``global``: those that all share; ``public``: those that no
                client holds.

        Raises:
            FedjetsError: there are none, or a training client's have no targets.
        """

    def inputs(self, stored: Tensor, common: CommonExpert, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get the input batch of whole models; a generator turns training augmentation on."""

    def loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the mean loss of a batch, a scalar; ``offset`` is added to the logits of each class, (C,)."""

    def total_loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the sum of the samples' losses, a scalar."""

    @property
    def at_once(self) -> int:
        """How many samples a model answers in one batch."""

    def predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return what of a batch's outputs is kept: class probabilities (b, C), or what scores it."""

    def count_right(self, predictions: Tensor, targets: Tensor) -> list[int]:
        """Return how many predictions are right, and of how many."""

    def told(self, predictions: Tensor, samples: Samples) -> dict[str, float]:
        """Return what else a client tells of its own tests, by the names in :attr:`tells`."""

    def written(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return what takes the model itself, since it writes its answers, by the names in :attr:`scores`."""
