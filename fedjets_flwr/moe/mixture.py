"""Inference of K experts under a gate: one path for a run's evaluation, a site's own model and an exported graph."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.gating import READ_OUTS, chosen_weights, scores, top_1_of
from fedjets_flwr.tasks.base import Inputs

COMMON = "common"
"""The read-out where the common expert answers, to which the samples are more familiar (``gating.keeps_common``)."""


@dataclass(frozen=True)
class Mixture:
    """K of M experts under a gate, ready to answer.

    Attributes:
        experts: the K models.
        ids: theirs among the M.
        gate: over all M, or the scores (M,) that all samples share where there is none.
        read_out: how they answer, a key of ``gating.READ_OUTS``, or :data:`COMMON`.
    """

    experts: Sequence[FlatModel]
    ids: Sequence[int]
    gate: nn.Module | Tensor
    read_out: str


def probabilities(experts: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """Return the class probabilities of K experts in eval mode for n inputs, (K, n, C)."""
    return torch.stack([expert(inputs).softmax(dim=1) for expert in experts])


def sample_scores(gate: nn.Module | Tensor, embedding: Tensor) -> Tensor:
    """Return a gate's scores of all M experts, (n, M), or those that all samples share."""
    if isinstance(gate, Tensor):
        return gate.expand(embedding.shape[0], -1)
    return scores(gate(embedding))


def read(probs: Tensor, all_scores: Tensor, ids: Sequence[int], common: Tensor, read_out: str) -> tuple[Tensor, Tensor]:
    """Return the mixture's class probabilities, (n, C), and the id of each sample's best expert, (n,) int64.

    Where the common expert answers, the id is -1.

    Args:
        probs: of the K experts, (K, n, C).
        all_scores: of all M experts, (n, M).
        ids: of the K experts among the M.
        common: the common expert's probabilities, (n, C).
        read_out: a key of ``gating.READ_OUTS``, or :data:`COMMON`.
    """
    weights = chosen_weights(all_scores, ids, renormalise=False)
    if read_out == COMMON:
        return common, torch.full_like(common[:, 0], -1, dtype=torch.int64)
    return READ_OUTS[read_out](probs, weights, common, False), torch.tensor(ids)[top_1_of(weights)]


@torch.inference_mode()
def predict(models: Sequence[FlatModel], inputs: Inputs, count: int, batch_size: int = 512) -> Tensor:
    """Return the models' class probabilities in eval mode, (K, count, C), on the CPU."""
    for model in models:
        model.module.eval()
    parts = []
    for rows in torch.arange(count).split(batch_size):
        x = inputs(rows)
        parts.append(probabilities([model.module for model in models], x).cpu())
    return torch.cat(parts, dim=1)


def gate_scores(gate: nn.Module | Tensor, embedding: Tensor, device: torch.device) -> Tensor:
    """Return the scores of :func:`sample_scores` on the CPU."""
    with torch.inference_mode():
        return sample_scores(gate, embedding.to(device)).cpu()
