"""FedAvg's local training (McMahan et al. 2017): the task's plain loss on each model that the client received."""

from collections.abc import Mapping

from torch import Tensor

from client_app.client import ClientContext, Update
from client_app.training import train_one
from fedjets_flwr.names import expert_name


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train every model of the job by itself; return their vectors, the sample count and the mean loss."""
    models = context.experts(vectors)
    losses = [train_one(context, model, member) for member, model in models.items()]
    trained = {expert_name(m): model.vector for m, model in models.items()}
    return Update(trained, {"num-examples": len(context.data), "loss": sum(losses) / len(losses)})
