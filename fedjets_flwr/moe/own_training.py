"""Training models of a client's own on its samples, stopped early: in a run, and at a site that took part in none."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Adapt
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import Stopped, fit_until_no_better, mean_loss
from fedjets_flwr.moe.local_training import Adam, batches
from fedjets_flwr.tasks.base import Inputs, Losses


@dataclass(frozen=True)
class Held:
    """Samples that a model is trained on, or that stop it: how to get their inputs, and their targets (n, ...)."""

    inputs: Inputs
    targets: Tensor


def fit_own(
    model: FlatModel, train: Held, stop: Held, losses: Losses, rule: Adapt, lr: float, order: torch.Generator
) -> Stopped:
    """Train a model in place by Adam until the samples of ``stop`` say so (``adapt.*``).

    Args:
        model: ends with the weights of its lowest validation loss.
        train: is passed over once an epoch.
        stop: as it is, without augmentation.
        losses: of outputs and targets.
        rule: batch size, epochs, and when to stop.
        lr: Adam's rate.
        order: of the batches.
    """

    def losses_of(rows: Tensor) -> list[Tensor]:
        return [losses.mean(model.module(train.inputs(rows)), train.targets[rows])]

    def validation_loss() -> float:
        return mean_loss(model, stop.inputs, stop.targets, losses.total)

    def epoch() -> Iterator[Tensor]:
        return batches(len(train.targets), rule.batch_size, 1, order)

    return fit_until_no_better(model, Adam(model, lr), epoch, losses_of, validation_loss, rule)
