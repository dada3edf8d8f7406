"""Scoring a client that trains, on samples of its own: it adapts first, where its method says how."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from client_app.client import Adapt, Adapted, ClientContext, Update, Work
from client_app.queries import expert_probabilities, read_out_weights
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import Stopped, fit_until_no_better, mean_loss
from fedjets_flwr.moe.gating import READ_OUTS
from fedjets_flwr.moe.local_training import Adam, batches
from fedjets_flwr.moe.metrics import READINGS, Reading, readings
from fedjets_flwr.moe.mixture import predict
from fedjets_flwr.seeds import torch_generator


def scored(adapt: Adapt) -> Work:
    """Return what counts a client's right predictions, once it has adapted."""

    def score(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Count right and total on the client's own test part and, if they are here, on test images that all share."""
        own, parts = adapt(context, vectors), {"local": "test"}
        if context.runtime.has_global:
            parts["global"] = "global"
        counts = {name: _count(own, context.on(part)) for name, part in parts.items()}
        return Update(numbers=dict(counts), state=own.state)

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


def fit_own(context: ClientContext, model: FlatModel) -> Stopped:
    """Train a model in place on the client's train part until its validation part says stop (``adapt.*``).

    Without an offset: a model of one's own may learn how often one's labels occur. What comes out depends on the
    model, the client's samples and the seed alone, and on no round.
    """
    rule, seed, client = context.config.adapt, context.config.run.seed, context.client
    data, val = context.data, context.on("val")
    order = torch_generator(seed, "adapt", client)
    inputs = context.runtime.inputs(data, torch_generator(seed, "adapt augment", client, device=context.device))

    def losses_of(rows: Tensor) -> list[Tensor]:
        return [context.task.loss(model.module(inputs(rows)), data.targets[rows])]

    def validation_loss() -> float:
        return mean_loss(model, val.plain_inputs(), val.data.targets, context.task.total_loss)

    def epoch() -> Iterator[Tensor]:
        return batches(len(data), rule.batch_size, 1, order)

    return fit_until_no_better(model, Adam(model, rule.lr), epoch, losses_of, validation_loss, rule)


def answering(model: FlatModel) -> Adapted:
    """Return one model as a client's own."""
    return Adapted(lambda at: predict([model], at.plain_inputs(), len(at.data))[0])
