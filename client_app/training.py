"""Local training of one model by the task's loss, which methods share."""

from torch import Tensor

from client_app.client import ClientContext
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Correction, fit


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
