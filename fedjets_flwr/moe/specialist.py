"""A client's mixture of its own specialist and the generalist of all (Listo Zec et al. 2020, section 3).

Shapes: n samples, C classes. ``a`` is the gate's logit, h = sigmoid(a) the specialist's share of an answer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.sections import Specialist
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.tasks.base import Inputs, Losses

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The gate's logit (n, 1), log-probabilities of specialist and generalist (n, C) -> scores (n, C)."""


def log_mixture(gate_logit: Tensor, local: Tensor, shared: Tensor) -> Tensor:
    """Return log p = log(h p_l + (1 - h) p_g)."""
    return torch.logaddexp(F.logsigmoid(gate_logit) + local, F.logsigmoid(-gate_logit) + shared)


def mixed_logs(gate_logit: Tensor, local: Tensor, shared: Tensor) -> Tensor:
    """Return h log p_l + (1 - h) log p_g, as the public code has it: no distribution.

    By Jensen's inequality it is nowhere above :func:`log_mixture`.
    """
    share = gate_logit.sigmoid()
    return share * local + (1 - share) * shared


MIXES: dict[str, Mix] = {"probs": log_mixture, "log-probs": mixed_logs}

TRAINED: dict[str, tuple[str, ...]] = {
    "gate": ("gate",),
    "gate+local": ("gate", "local"),
    "all": ("gate", "local", "shared"),
}
"""Which parts of the mixture ``specialist.trains`` names."""


class SpecialistMixture(nn.Module):
    """Scores (n, C) of a batch, whose negative log-likelihood is the loss.

    Attributes:
        gate: of the same input, or of the generalist's penultimate features, to one logit.
        local: the specialist.
        shared: the generalist.
    """

    def __init__(
        self, gate: nn.Module, local: nn.Sequential, shared: nn.Sequential, mix: Mix, trained: tuple[str, ...]
    ) -> None:
        """Put the parts together; those that are not ``trained`` keep their weights and statistics.

        A gate that is one linear unit reads the generalist's features.
        """
        super().__init__()
        self.gate, self.local, self.shared = gate, local, shared
        self._mix, self._trained = mix, trained
        for name, part in self.named_children():
            part.requires_grad_(name in trained)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores."""
        features = self.shared[:-1](inputs)
        answers = self.local(inputs).log_softmax(dim=1), self.shared[-1](features).log_softmax(dim=1)
        return self._mix(self._logit(inputs, features), *answers)

    def _logit(self, inputs: Tensor, features: Tensor) -> Tensor:
        logit: Tensor = self.gate(features if isinstance(self.gate, nn.Linear) else inputs)
        return logit

    def shares(self, inputs: Tensor) -> Tensor:
        """Return the specialist's share h of each sample, (n,)."""
        return self._logit(inputs, self.shared[:-1](inputs)).sigmoid().squeeze(1)

    def train(self, mode: bool = True) -> Self:
        """Put the trained parts in training mode, or all in eval mode."""
        super().train(mode)
        for name, part in self.named_children():
            part.train(mode and name in self._trained)
        return self


def build_mixture(architecture: Architecture, trainable: str, how: Specialist, seed: int) -> SpecialistMixture:
    """Return a mixture whose models are to be filled, and whose gate is at its start: both answer alike.

    Args:
        architecture: of specialist and generalist, or of the models whose tails they are.
        trainable: which part of a model that is (``moe.trainable``).
        how: ``specialist.*``.
        seed: of the gate.
    """
    local, shared = (tail(build(architecture, 0), trainable) for _ in range(2))
    network = build(replace(architecture, num_classes=1), seed)
    gate = tail(network, trainable) if how.gate == "network" else network[-1:]
    chosen = silent(gate[0] if len(gate) == 1 else gate)
    return SpecialistMixture(chosen, local, shared, MIXES[how.mix], TRAINED[how.trains])


def filled(mixture: SpecialistMixture, local: Tensor, shared: Tensor, device: torch.device) -> FlatModel:
    """Return a mixture on a device, of the vectors of a specialist and a generalist."""
    FlatModel(mixture.local).load(local.cpu())
    FlatModel(mixture.shared).load(shared.cpu())
    return FlatModel(mixture.to(device))


@torch.inference_mode()
def mean_share(mixture: SpecialistMixture, inputs: Inputs, count: int, batch_size: int = 512) -> float:
    """Return the mean share of the specialist in the answers to some samples."""
    mixture.eval()
    return float(torch.cat([mixture.shares(inputs(r)) for r in torch.arange(count).split(batch_size)]).mean())


def total_nll(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods."""
    return F.nll_loss(scores, targets, reduction="sum")


NLL = Losses(F.nll_loss, total_nll)
"""Of a mixture's scores."""


def silent(gate: nn.Module) -> nn.Module:
    """Return a gate whose last layer is made zero: h = 1/2 for every input."""
    *_, head = gate.modules()
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return gate
