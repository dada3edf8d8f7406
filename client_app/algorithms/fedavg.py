"""FedAvg's local training (McMahan et al. 2017): the task's plain loss on each model that the client received."""

from collections.abc import Mapping

from torch import Tensor

from client_app.client import ClientContext, Update
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Correction, fit
from fedjets_flwr.names import expert_name


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train every model of the job by itself; return their vectors, the sample count and the mean loss."""
    models = context.experts(vectors)
    losses = [train_one(context, model, member) for member, model in models.items()]
    trained = {expert_name(m): model.vector for m, model in models.items()}
    return Update(trained, {"num-examples": len(context.data), "loss": sum(losses) / len(losses)})


def train_one(context: ClientContext, model: FlatModel, member: int = 0, correct: Correction | None = None) -> float:
    """Train one model in place on the task's loss; return the mean loss.

    Args:
        context: the client's job.
        model: the model.
        member: which of several independent models; decides order and augmentation.
        correct: changes each gradient in place before its step.
    """
    data, inputs = context.data, context.inputs(member)

    def losses_of(rows: Tensor) -> list[Tensor]:
        return [context.task.loss(context.forward(model.module, inputs(rows)), data.targets[rows], data.offset)]

    return fit([model], [context.optimizer(model)], context.order(member), losses_of, correct)
