"""SCAFFOLD's local training (Karimireddy et al. 2020): every gradient is corrected by c - c_i.

The server keeps all variates and sends the difference; of option II it computes the new variate itself, from the model
that comes back and the number of steps, so that nothing but the model travels up.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import ClientContext, Update
from client_app.training import train_one
from fedjets_flwr.moe.local_training import round_steps


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train ``expert.0``; with option I also return the full-batch gradient at the start, the new variate."""
    client = context.client
    correction = vectors[f"correction.{client}"].to(context.device)
    returned: dict[str, Tensor] = {}
    if context.config.scaffold.option == "I":
        returned[f"variate.{client}"] = _full_gradient(context, vectors["expert.0"])
    model = context.expert(0, vectors["expert.0"])
    changes = model.views(correction)

    def move() -> None:
        for gradient, change in zip(model.gradients, changes, strict=True):
            gradient.add_(change)

    loss = train_one(context, model, correct=move)
    count = len(context.data)
    steps = round_steps(context.config.train, count)
    return Update(returned | {"expert.0": model.vector}, {"num-examples": count, "loss": loss, "steps": steps})


def _full_gradient(context: ClientContext, vector: Tensor) -> Tensor:
    """Return the gradient of the mean loss over all local samples at ``vector``, in eval mode (statistics stay)."""
    data, inputs, model = context.data, context.plain_inputs(), context.expert(0, vector)
    model.module.eval()
    model.zero_grad()
    for rows in torch.arange(len(data)).split(context.config.train.batch_size):
        loss = context.task.total_loss(model.module(inputs(rows)), data.targets[rows], data.offset)
        loss.div(len(data)).backward()
    return torch.cat([gradient.flatten() for gradient in model.gradients])
