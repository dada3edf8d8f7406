"""IFCA's local training (Ghosh et al. 2020): the model that fits the client's samples best, by FedAvg's steps."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import Adapted, ClientContext, Update
from client_app.participants import answering
from client_app.training import train_one
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import mean_loss


@torch.no_grad()
def best_fitting(context: ClientContext, models: Mapping[int, FlatModel]) -> int:
    """Return the id of the model with the lowest loss on the client's training samples; one drawn among equals.

    Raises:
        FedjetsError: no model has a finite loss.
    """
    data, inputs, task = context.data, context.plain_inputs(), context.task

    def total_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return task.total_loss(outputs, targets, data.offset)

    losses = {m: mean_loss(model, inputs, data.targets, total_loss) for m, model in models.items()}
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if not finite:
        raise FedjetsError("no model has a finite loss on the client's samples; lower train.lr")
    equal = [m for m, loss in losses.items() if loss == min(finite)]
    return equal[int(torch.randint(len(equal), (1,), generator=context.generator("cluster")))]


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Adapt nothing: of a client with labels the model answers that fits its training samples best, as in a round."""
    models = context.experts(vectors)
    return answering(models[best_fitting(context, models)])


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train the model that fits best; return it, which one it is, the sample count and the mean loss."""
    models = context.experts(vectors)
    cluster = best_fitting(context, models)
    loss = train_one(context, models[cluster], cluster)
    numbers = {"num-examples": len(context.data), "loss": loss, "cluster": cluster}
    return Update({"trained": models[cluster].vector}, numbers)
