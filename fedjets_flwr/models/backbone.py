"""The common expert cut where the experts begin: what is frozen below them, and what they read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedjets_flwr.models.architectures import tail_start
from fedjets_flwr.models.common_expert import CommonExpert

Seen = Mapping[str, Tensor]
"""What the common expert makes of n images: ``trunk`` (n, ...), ``penultimate`` (n, d), ``logits`` (n, C)."""


@dataclass(frozen=True)
class Backbone:
    """The frozen part below experts that are ``all``, a ``stage`` or a ``head`` (``moe.trainable``).

    The only place that knows what an expert of each kind reads.
    """

    common: CommonExpert
    trainable: str

    @cached_property
    def parts(self) -> tuple[nn.Sequential, nn.Sequential, nn.Module]:
        """Trunk, neck (from the trunk's output to the penultimate features) and head."""
        model = self.common.model
        start = tail_start(model, self.trainable if self.keeps_trunk else "head")
        return model[:start], model[start:-1], model[-1]

    @property
    def keeps_trunk(self) -> bool:
        """Whether the trunk ends before the penultimate features."""
        return self.trainable == "stage"

    @property
    def cached(self) -> str:
        """Which part of :data:`Seen` the experts read; empty: the images themselves."""
        return {"all": "", "stage": "trunk", "head": "penultimate"}[self.trainable]

    def see(self, images: Tensor, parts: tuple[nn.Module, nn.Module, nn.Module] | None = None) -> Seen:
        """Return what the common expert makes of normalised images, by its own parts or by copies of them."""
        trunk, neck, head = parts or self.parts
        below = trunk(images)
        penultimate = neck(below)
        return {"trunk": below, "penultimate": penultimate, "logits": head(penultimate)}

    def expert_input(self, images: Tensor, seen: Seen) -> Tensor:
        """Return the experts' input: normalised images, or what the trunk makes of them."""
        return seen[self.cached] if self.cached else images

    def sample_input(self, whole: Tensor) -> Tensor:
        """Return an expert's input, of one sample as a whole model reads it."""
        with torch.no_grad():
            sample: Tensor = self.common.model[: tail_start(self.common.model, self.trainable)](whole)
        return sample
