"""Scoring a client that trains, on samples of its own: it adapts first, where its method says how."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import Adapt, Adapted, ClientContext, Update, Work
from client_app.queries import expert_probabilities, read_out_weights
from fedjets_flwr.models.architectures import build, tail
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe import own_training
from fedjets_flwr.moe.early_stopping import Stopped
from fedjets_flwr.moe.gating import READ_OUTS
from fedjets_flwr.moe.metrics import READINGS, Reading, readings
from fedjets_flwr.moe.mixture import predict
from fedjets_flwr.moe.own_training import Held
from fedjets_flwr.seeds import derive, torch_generator
from fedjets_flwr.tasks.base import Losses


def scored(adapt: Adapt) -> Work:
    """Return what counts a client's right predictions, once it has adapted."""

    def score(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Count right and total on the client's own test part and, if they are here, on test images that all share."""
        own, parts = adapt(context, vectors), {"local": "test"}
        if context.runtime.has_global:
            parts["global"] = "global"
        counts = {name: _count(own, context.on(part)) for name, part in parts.items()}
        return Update(numbers={**counts, **own.numbers}, state=own.state)

    return score


def _count(own: Adapted, context: ClientContext) -> list[int]:
    return context.task.count_right(own.predict(context), context.data.samples.targets)


def as_received(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Adapt nothing: the experts answer as they came, by the read-out and prior that count for the method."""

    def probabilities(at: ClientContext) -> Tensor:
        reading = Reading.of(READINGS[at.job.numbers["reading"]])
        probs = expert_probabilities(at, vectors, reading.statistics)
        weights, _ = read_out_weights(at, vectors, probs)
        common = at.data.embedded.logits.softmax(1)
        return readings(READ_OUTS[reading.read_out](probs, weights, common), at.data.samples.targets)[reading.prior]

    return Adapted(probabilities)


def fit_own(context: ClientContext, model: FlatModel, lr: float = 0.0, losses: Losses | None = None) -> Stopped:
    """Train a model in place on the client's train part until its validation part says stop (``adapt.*``).

    Without an offset: a model of one's own may learn how often one's labels occur. What comes out depends on the
    model, the client's samples and the seed alone, and on no round.

    Args:
        context: on the client's train part.
        model: in place.
        lr: Adam's rate; 0: ``adapt.lr``.
        losses: by default the task's.
    """
    rule, seed, client = context.config.adapt, context.config.run.seed, context.client
    loss = losses or Losses(context.task.loss, context.task.total_loss)
    torch.manual_seed(derive(seed, "adapt dropout", client))
    data, val = context.data, context.on("val")
    augment = torch_generator(seed, "adapt augment", client, device=context.device)
    train, stop = Held(context.runtime.inputs(data, augment), data.targets), Held(val.plain_inputs(), val.data.targets)
    return own_training.fit_own(model, train, stop, loss, rule, lr or rule.lr, torch_generator(seed, "adapt", client))


def random_start(context: ClientContext) -> FlatModel:
    """Return a client's own model at its random start."""
    start = build(context.runtime.architecture(0), derive(context.config.run.seed, "local", context.client))
    return context.copy(0, FlatModel(tail(start, context.config.moe.trainable)).vector)


def answering(model: FlatModel) -> Adapted:
    """Return one model as a client's own."""
    return Adapted(lambda at: predict([model], at.plain_inputs(), len(at.data))[0])
