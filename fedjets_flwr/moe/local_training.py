"""The local loops of a client. They know tensors and models, not messages."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fedjets_flwr.config.schema import Train
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.gating import anchor_gate_loss, chosen_weights, mixture_loss, scores

Inputs = Callable[[Tensor], Tensor]
"""Sample indices -> the experts' input batch (augmented images, or cached trunk features)."""


def batches(count: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index batches of ``epochs`` shuffled passes over ``count`` samples; the last of a pass may be smaller."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def steps_of(count: int, size: int, epochs: int) -> int:
    """Return how many batches :func:`batches` yields."""
    return epochs * math.ceil(count / size)


def rate(train: Train, server_round: int, rounds: int) -> float:
    """Return the experts' learning rate of a round (1-based): constant, or a half cosine that ends near zero."""
    if train.schedule == "constant":
        return train.lr
    return train.lr * 0.5 * (1 + math.cos(math.pi * (server_round - 1) / rounds))


class Sgd:
    """SGD on the weights of one model; momentum begins empty.

    The step is torch's own. Its class ``torch.optim.SGD`` imports the compiler on first use, more than a second of a
    deployed client's process, which serves one message.
    """

    def __init__(self, model: FlatModel, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self._model, self._lr, self._momentum, self._weight_decay = model, lr, momentum, weight_decay
        self._buffers: list[Tensor | None] = [None] * len(model.parameters)

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by their gradients."""
        sgd(
            list(self._model.parameters), self._model.gradients, self._buffers, foreach=True, lr=self._lr,
            momentum=self._momentum, weight_decay=self._weight_decay, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


def train_normal(
    experts: Sequence[FlatModel],
    ids: Sequence[int],
    gate: FlatModel,
    inputs: Inputs,
    embedding: Tensor,
    labels: Tensor,
    order: Iterator[Tensor],
    optimizers: Sequence[Sgd],
    mix: str,
    renormalise: bool,
    offset: Tensor | float = 0.0,
    fixed_scores: Tensor | None = None,
) -> float:
    """Train K experts and the gate jointly on the mixture's cross entropy (FedJETs, section 4, normal clients).

    ``optimizers`` are stepped together once a batch; ``offset`` is that of :func:`gating.label_offset`;
    ``fixed_scores``, (n, M), stand in for the gate's (an oracle). Returns the mean batch loss.
    """
    models = [*experts, gate]
    for model in models:
        model.module.train()
    losses = []
    for rows in order:
        x = inputs(rows)
        gate_scores = scores(gate.module(embedding[rows])) if fixed_scores is None else fixed_scores[rows]
        weights = chosen_weights(gate_scores, ids, renormalise)
        logits = torch.stack([expert.module(x) for expert in experts])
        loss = mixture_loss(logits, weights, labels[rows], mix, offset)
        _step(loss, models, optimizers)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def train_anchor(
    expert: FlatModel,
    expert_id: int,
    gate: FlatModel,
    inputs: Inputs,
    embedding: Tensor,
    labels: Tensor,
    order: Iterator[Tensor],
    optimizers: Sequence[Sgd],
    offset: Tensor | float = 0.0,
) -> float:
    """Train the anchor's expert on its cross entropy and the gate to name that expert: two independent losses.

    Returns the mean batch loss of the expert.
    """
    models = [expert, gate]
    for model in models:
        model.module.train()
    losses = []
    for rows in order:
        loss = F.cross_entropy(expert.module(inputs(rows)) + offset, labels[rows])
        # The two losses share no weight, so one backward pass of their sum is the two independent ones.
        _step(loss + anchor_gate_loss(gate.module(embedding[rows]), expert_id), models, optimizers)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def train_supervised(
    model: FlatModel,
    inputs: Inputs,
    labels: Tensor,
    order: Iterator[Tensor],
    optimizer: Sgd,
    correct_gradient: Callable[[FlatModel], None] | None = None,
    offset: Tensor | float = 0.0,
) -> float:
    """Train one model on its cross entropy (FedAvg's local loop); return the mean batch loss.

    ``correct_gradient`` may change the gradient vector in place before each step (FedProx, SCAFFOLD).
    """
    model.module.train()
    losses = []
    for rows in order:
        loss = F.cross_entropy(model.module(inputs(rows)) + offset, labels[rows])
        model.zero_grad()
        loss.backward()
        if correct_gradient is not None:
            correct_gradient(model)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _step(loss: Tensor, models: Sequence[FlatModel], optimizers: Sequence[Sgd]) -> None:
    for model in models:
        model.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.inference_mode()
def predict(models: Sequence[FlatModel], inputs: Inputs, count: int, batch_size: int = 512) -> Tensor:
    """Return the models' class probabilities in eval mode, (K, count, C), on the CPU."""
    for model in models:
        model.module.eval()
    parts = []
    for rows in torch.arange(count).split(batch_size):
        x = inputs(rows)
        parts.append(torch.stack([model.module(x).softmax(dim=1) for model in models]).cpu())
    return torch.cat(parts, dim=1)


def gate_scores(gate: nn.Module | None, embedding: Tensor, num_experts: int, device: torch.device) -> Tensor:
    """Return the scores of all M experts, (n, M), on the CPU; equal ones without a gate."""
    if gate is None:
        return torch.full((len(embedding), num_experts), 1 / num_experts)
    with torch.inference_mode():
        return scores(gate(embedding.to(device))).cpu()
