"""Training until validation samples say stop: a client's own model, a run (Listo Zec et al. 2020, as their code)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedjets_flwr.config.sections import Adapt, EarlyStopping
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import LossesOf, Optimizer, fit
from fedjets_flwr.tasks.base import Inputs, LossOf


def looks(rule: EarlyStopping, server_round: int) -> bool:
    """Return whether the clients of a round look at the model that they receive: what rounds 1, 1 + e, .. left."""
    return rule.check_every > 0 and server_round > 1 and (server_round - 2) % rule.check_every == 0


@dataclass(frozen=True)
class Stopped:
    """How a training ended.

    Attributes:
        epochs: that it did.
        losses: the validation loss at each look.
        kept: the look whose weights were kept; -1: none was finite, and the model is as it was.
    """

    epochs: int
    losses: tuple[float, ...]
    kept: int


def fit_until_no_better(
    model: FlatModel,
    optimizer: Optimizer,
    epoch: Callable[[], Iterator[Tensor]],
    losses_of: LossesOf,
    validation_loss: Callable[[], float],
    rule: Adapt,
) -> Stopped:
    """Train a model in place and leave it with the weights of its lowest validation loss.

    The loss is looked at after epochs 1, 1 + e, 1 + 2e, .. up to ``max_epochs`` (e = ``check_every``); epochs after the
    last look could not be kept and are not done. A look that is not lower by more than ``min_fall`` than the last that
    was counts against ``patience``. Without an epoch the model stays as it is, bit for bit.

    Args:
        model: is put in training mode by each epoch.
        optimizer: of the model; keeps its moments over the epochs.
        epoch: returns the index batches of one pass.
        losses_of: as in :func:`local_training.fit`.
        validation_loss: of the model as it is now.
        rule: when to look, and when to stop.
    """
    losses: list[float] = []
    best, lowest, counted, late, done, kept = model.vector.clone(), float("inf"), float("inf"), 0, 0, -1
    for number in range(1, rule.max_epochs + 1, rule.check_every):
        for _ in range(number - done):
            fit([model], [optimizer], epoch(), losses_of)
        done = number
        losses.append(validation_loss())
        if losses[-1] < lowest:
            best, lowest, kept = model.vector.clone(), losses[-1], len(losses) - 1
        better = losses[-1] < counted - rule.min_fall
        counted, late = (losses[-1], 0) if better else (counted, late + 1)
        if late == rule.patience:
            break
    model.load(best)
    return Stopped(done, tuple(losses), kept)


@torch.inference_mode()
def mean_loss(model: FlatModel, inputs: Inputs, targets: Tensor, total_loss: LossOf, batch_size: int = 512) -> float:
    """Return the mean over all samples of a model's loss in eval mode; ``total_loss`` sums it over a batch."""
    model.module.eval()
    rows = torch.arange(len(targets)).split(batch_size)
    sums = [total_loss(model.module(inputs(r)), targets[r]).double() for r in rows]
    return float(torch.stack(sums).sum()) / len(targets)
