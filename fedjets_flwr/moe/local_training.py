"""The local loops of a client. They know tensors and models, not messages."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedjets_flwr.config.sections import Train
from fedjets_flwr.models.flat_model import FlatModel


def batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches of ``epochs`` shuffled passes over ``count`` samples; the last of a pass may be smaller."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def steps_of(count: int, size: int, epochs: int) -> int:
    """Return how many batches :func:`batches` yields."""
    return epochs * math.ceil(count / size)


def round_steps(train: Train, count: int) -> int:
    """Return the local steps of a round on ``count`` samples."""
    return train.local_steps or steps_of(count, train.batch_size, train.local_epochs)


def rate(train: Train, server_round: int, rounds: int) -> float:
    """Return the experts' learning rate of a round (1-based): constant, or a half cosine that ends near zero."""
    if train.schedule == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / max(1, rounds)))


class Optimizer(Protocol):
    """What changes a model's weights by their gradients."""

    def step(self) -> None:
        """Do it once."""


class Sgd:
    """SGD on the weights of one model; momentum begins empty.

    Attributes:
        buffers: the momentum of each parameter.

    The step is torch's own. Its class ``torch.optim.SGD`` imports the compiler on first use, more than a second of a
    deployed client's process, which serves one message.
    """

    def __init__(self, model: FlatModel, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self._model, self._lr, self._momentum, self._weight_decay = model, lr, momentum, weight_decay
        self.buffers: list[Tensor | None] = [None] * len(model.parameters)

    def carry(self, momentum: Tensor | None) -> Tensor:
        """Go on with the momentum that an earlier optimizer of the model left, (spec.trained,); None: with none.

        Returns it; each step changes it in place.
        """
        carried = self._model.vector.new_zeros(self._model.spec.trained)
        if momentum is not None:
            carried.copy_(momentum)
        self.buffers = [*self._model.views(carried)]
        return carried

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by their gradients."""
        sgd(
            list(self._model.parameters), self._model.gradients, self.buffers, foreach=True, lr=self._lr,
            momentum=self._momentum, weight_decay=self._weight_decay, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


class Adam:
    """Adam (Kingma and Ba 2015) with its usual constants, on the weights of one model; torch's own step, as above."""

    def __init__(self, model: FlatModel, lr: float) -> None:
        self._model, self._lr = model, lr
        self._means, self._squares = ([torch.zeros_like(p) for p in model.parameters] for _ in range(2))
        self._steps = [torch.tensor(0.0) for _ in model.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by their gradients."""
        adam(
            list(self._model.parameters), self._model.gradients, self._means, self._squares, [], self._steps,
            foreach=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=self._lr, weight_decay=0.0, eps=1e-8,
            maximize=False,
        )  # fmt: skip


LossesOf = Callable[[Tensor], Sequence[Tensor]]
"""Sample indices -> the losses of a step, scalars that share no weight; the first one is what is reported."""
Correction = Callable[[], None]
"""Changes the gradients in place before a step (FedProx, SCAFFOLD)."""


def fit(
    models: Sequence[FlatModel],
    optimizers: Sequence[Optimizer],
    order: Iterator[Tensor],
    losses_of: LossesOf,
    correct: Correction | None = None,
) -> float:
    """Train models in place, one step a batch; return the mean over batches of the first loss.

    Args:
        models: all that the losses use; they are put in training mode.
        optimizers: are stepped together.
        order: index batches.
        losses_of: what a batch's gradient is of: the sum of its losses, in one backward pass.
        correct: is called between gradient and step.
    """
    for model in models:
        model.module.train()
    reported = []
    for rows in order:
        losses = losses_of(rows)
        for model in models:
            model.zero_grad()
        reduce(add, losses).backward()
        if correct is not None:
            correct()
        for optimizer in optimizers:
            optimizer.step()
        reported.append(losses[0].detach())
    return float(torch.stack(reported).mean())
