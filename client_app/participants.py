"""Scoring a client that trains, on samples of its own: it adapts first, where its method says how."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from client_app.client import Adapt, Adapted, ClientContext, Update, Work
from client_app.queries import expert_probabilities, read_out_weights
from client_app.training import train_one
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe import own_training
from fedjets_flwr.moe.early_stopping import Stopped
from fedjets_flwr.moe.gating import READ_OUTS
from fedjets_flwr.moe.metrics import READINGS, Reading, readings
from fedjets_flwr.moe.own_training import Held
from fedjets_flwr.seeds import derive, seed_layers, torch_generator
from fedjets_flwr.tasks.base import Losses
from fedjets_flwr.wire.messages import Number


def scored(adapt: Adapt) -> Work:
    """Return what counts a client's right predictions, once it has adapted."""

    def score(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Count right and total on the client's own test part and, if they are here, on test images that all share."""
        own, parts = adapt(context, vectors), {"local": "test"}
        if context.runtime.has_global and not ("gate" in vectors and context.runtime.oracle_of_domains):
            parts["global"] = "global"
        task, numbers = context.task, dict[str, Number](own.numbers)
        for name, part in parts.items():
            at = context.on(part)
            predictions, samples = own.predict(at), at.data.samples
            numbers[name] = task.count_right(predictions, samples.targets)
            if name == "local":
                numbers |= task.told(predictions, samples)
                numbers |= task.written(own.model.module, samples) if own.model is not None else {}
        if "tuned" in context.job.numbers and own.model is not None:
            numbers["tuned-bits-per-byte"] = _tuned(context, own.model)
        return Update(numbers=numbers, state=own.state)

    return score


def _tuned(context: ClientContext, model: FlatModel) -> float:
    """Return the bits per byte, on the client's test part, of what a first round's local training makes of a model."""
    own = FlatModel(deepcopy(model.module))  # the client keeps the other as it is
    train_one(replace(context, server_round=1), own)
    test = context.on("test")
    return context.task.told(predictions(own, test), test.data.samples)["bits-per-byte"]


def as_received(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Adapt nothing: the experts answer as they came, by the read-out and prior that count for the method."""
    if not context.task.classifies:
        return answering(context.expert(0, vectors["expert.0"]))

    def probabilities(at: ClientContext) -> Tensor:
        reading = Reading.of(READINGS[at.job.numbers["reading"]])
        probs = expert_probabilities(at, vectors, reading.statistics)
        weights, _ = read_out_weights(at, vectors, probs)
        common = at.data.embedded.logits.softmax(1)
        answers = READ_OUTS[reading.read_out](probs, weights, common, False)
        return readings(answers, at.data.samples.targets)[reading.prior]

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
    seed_layers(derive(seed, "adapt dropout", client))
    data, val = context.data, context.on("val")
    augment = torch_generator(seed, "adapt augment", client, device=context.device)
    train = Held(context.runtime.inputs(data, augment), data.targets)
    stop = Held(val.plain_inputs(), val.data.targets, context.task.at_once)
    return own_training.fit_own(model, train, stop, loss, rule, lr or rule.lr, torch_generator(seed, "adapt", client))


def own_start(context: ClientContext) -> FlatModel:
    """Return a client's own model at its start, random or the common expert (``adapt.start``)."""
    config, architecture = context.config, context.runtime.architecture(0)
    seed = derive(config.run.seed, "local", context.client)
    start = own_training.start_of(config, context.runtime.common, architecture, seed)
    return context.copy(0, FlatModel(start).vector)


def answering(model: FlatModel) -> Adapted:
    """Return one model as a client's own."""
    return Adapted(lambda at: predictions(model, at), model=model)


@torch.inference_mode()
def predictions(model: FlatModel, at: ClientContext) -> Tensor:
    """Return what a model in eval mode says of a context's samples, (n, ...) on the CPU (``Task.predictions``)."""
    model.module.eval()
    inputs, targets, task = at.plain_inputs(), at.data.targets, at.task
    rows = torch.arange(len(at.data)).split(task.at_once)
    return torch.cat([task.predictions(model.module(inputs(r)), targets[r]).cpu() for r in rows])
