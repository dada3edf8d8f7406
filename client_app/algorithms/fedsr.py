"""FedSR's local training (Nguyen et al. 2022): cross entropy and a simple representation, of few steps."""

from collections.abc import Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from client_app.client import ClientContext, Update
from fedjets_flwr.models.bottleneck import Bottleneck
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import LossesOf, Optimizer, fit
from fedjets_flwr.moe.representation import FORMS, Reference


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train ``expert.0``, and beside a stochastic bottleneck the client's own reference; it and the momentum stay."""
    model, steps = context.expert(0, vectors["expert.0"]), context.config.fedsr.steps
    stages = list(model.module.children())
    if len(stages) > 1 and isinstance(neck := stages[-2], Bottleneck):
        references = [_reference(context, neck)]
        losses_of = _drawn(context, nn.Sequential(*stages[:-2]), neck, stages[-1], references[0])
    else:
        references, losses_of = [], _plain(context, nn.Sequential(*stages[:-1]), stages[-1])
    order = islice(context.order(epochs=steps), steps) if steps else context.order()
    models = [model, *references]
    state = {"reference": references[0].vector} if references else {}
    optimizers: list[Optimizer] = []
    for number, each in enumerate(models):
        if context.config.fedsr.keep_momentum:
            optimizers.append(sgd := context.sgd(each))
            state[f"momentum.{number}"] = sgd.carry(context.state.get(f"momentum.{number}"))
        else:
            optimizers.append(context.optimizer(each))
    loss = fit(models, optimizers, order, losses_of)
    return Update({"expert.0": model.vector}, {"num-examples": len(context.data), "loss": loss}, state)


def _plain(context: ClientContext, body: nn.Module, head: nn.Module) -> LossesOf:
    """Return the losses of FedL2R: the representation is what ``body`` makes of a sample."""
    how, data, inputs = context.config.fedsr, context.data, context.inputs()

    def losses_of(rows: Tensor) -> list[Tensor]:
        z = context.forward(body, inputs(rows))
        loss = context.task.loss(head(z), data.targets[rows], data.offset)
        return [loss + how.l2 * FORMS[how.l2_form](z)]

    return losses_of


def _drawn(
    context: ClientContext, body: nn.Module, neck: Bottleneck, head: nn.Module, reference: FlatModel
) -> LossesOf:
    """Return the losses of FedSR: one draw of the representation a sample and step."""
    how, data, inputs = context.config.fedsr, context.data, context.inputs()
    noise = context.generator("fedsr noise", device=context.device)

    def losses_of(rows: Tensor) -> list[Tensor]:
        mean, deviation = neck.moments(context.forward(body, inputs(rows)))
        z = mean + deviation * torch.randn(mean.shape, generator=noise, device=mean.device)
        loss = context.task.loss(head(z), data.targets[rows], data.offset)
        if how.l2:
            loss = loss + how.l2 * FORMS[how.l2_form](z)
        if how.cmi:
            loss = loss + how.cmi * reference.module(mean, deviation, data.targets[rows])
        return [loss]

    return losses_of


def _reference(context: ClientContext, neck: Bottleneck) -> FlatModel:
    """Return the client's reference as it left it, or at its start."""
    made = FlatModel(Reference(context.num_classes, neck.linear.in_features).to(context.device))
    if (kept := context.state.get("reference")) is not None:
        made.load(kept)
    return made
