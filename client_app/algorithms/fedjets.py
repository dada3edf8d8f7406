"""FedJETs' local training: an anchor trains its expert and names it to the gate, a normal client trains the mixture."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import ClientContext, Update
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.gating import anchor_gate_loss, chosen_weights, mixture_loss, scores
from fedjets_flwr.moe.local_training import LossesOf, Optimizer, Sgd, fit
from fedjets_flwr.names import expert_name


def train(context: ClientContext, vectors: Mapping[str, Tensor], own_mix: str = "logits") -> Update:
    """Train the experts of the job and the gate; return their new vectors, the sample count and the loss.

    ``own_mix`` is what the gate weights unless ``moe.mix`` says otherwise: logits, as the paper's "standard cross
    entropy" implies.
    """
    c = context.config
    experts, gate = context.experts(vectors), context.gate(vectors)
    optimizers: list[Optimizer] = [context.optimizer(expert) for expert in experts.values()]
    anchor = "anchor" in context.job.numbers
    learned = c.gate.trained_by(anchor)
    if learned:
        optimizers.append(Sgd(gate, c.gate.lr))
    kind = anchor_losses if anchor else normal_losses
    losses_of = kind(context, experts, gate, c.moe.mix or own_mix)
    loss = fit([*experts.values(), gate], optimizers, context.order(), losses_of)
    trained = {expert_name(m): expert.vector for m, expert in experts.items()} | (
        {"gate": gate.vector} if learned else {}
    )
    return Update(trained, {"num-examples": len(context.data), "loss": loss})


def anchor_losses(context: ClientContext, experts: Mapping[int, FlatModel], gate: FlatModel, mix: str) -> LossesOf:
    """Return an anchor's two independent losses: its expert's cross entropy, and the gate's against naming it."""
    data, inputs = context.data, context.inputs()
    ((expert_id, expert),) = experts.items()

    def losses_of(rows: Tensor) -> list[Tensor]:
        outputs = context.forward(expert.module, inputs(rows))
        loss = context.task.loss(outputs, data.targets[rows], data.offset)
        return [loss, anchor_gate_loss(gate.module(data.embedding[rows]), expert_id)]

    return losses_of


def normal_losses(context: ClientContext, experts: Mapping[int, FlatModel], gate: FlatModel, mix: str) -> LossesOf:
    """Return a normal client's loss: the mixture's cross entropy of K experts and the gate (FedJETs, section 4).

    An oracle's scores stand in for the gate's where ``gate.mode`` says so.
    """
    data, inputs, oracle = context.data, context.inputs(), context.oracle_scores()
    renormalise = context.config.moe.renormalise

    def losses_of(rows: Tensor) -> list[Tensor]:
        x = inputs(rows)
        sample_scores = scores(gate.module(data.embedding[rows])) if oracle is None else oracle[rows]
        weights = chosen_weights(sample_scores, list(experts), renormalise)
        logits = torch.stack([context.forward(expert.module, x) for expert in experts.values()])
        return [mixture_loss(logits, weights, data.targets[rows], mix, data.offset)]

    return losses_of
