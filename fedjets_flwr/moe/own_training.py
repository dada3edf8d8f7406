"""Training models of a client's own on its samples, stopped early: in a run, and at a site that took part in none."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Adapt
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import AnyArchitecture, build, tail
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import Stopped, fit_until_no_better, mean_loss
from fedjets_flwr.moe.local_training import Adam, batches
from fedjets_flwr.tasks.base import Inputs, Losses


@dataclass(frozen=True)
class Held:
    """Samples that a model is trained on, or that stop it: how to get their inputs, and their targets (n, ...)."""

    inputs: Inputs
    targets: Tensor
    at_once: int = 512  # of which outputs fit in memory


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
        return mean_loss(model, stop.inputs, stop.targets, losses.total, stop.at_once)

    def epoch() -> Iterator[Tensor]:
        return batches(len(train.targets), rule.batch_size, 1, order)

    return fit_until_no_better(model, Adam(model, lr), epoch, losses_of, validation_loss, rule)


def start_of(config: Config, common: CommonExpert, architecture: AnyArchitecture, seed: int) -> nn.Sequential:
    """Return a model of a client's own at its start, the common expert or random (``adapt.start``).

    Raises:
        FedjetsError: the common expert is another model than the settings ask for.
    """
    drawn = tail(build(architecture, seed), config.moe.trainable)
    if config.adapt.start == "random":
        return drawn
    start = tail(copy.deepcopy(common.model).requires_grad_(True), config.moe.trainable)
    if _shapes(start) != _shapes(drawn):
        raise FedjetsError(
            "adapt.start = 'common': the common expert is another model than the settings ask for; set it to 'random',"
            " or the model's sizes to those of the common expert"
        )
    return start


def _shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in model.state_dict().items()]
