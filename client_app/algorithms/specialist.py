"""The generalist is trained as in FedAvg; a client mixes it with a specialist of its own, which never leaves it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.algorithms.fedavg import train
from client_app.client import Adapted, ClientContext
from client_app.participants import Losses, answering, fit_own, own_start
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.specialist import MIXES, TRAINED, SpecialistMixture, silent
from fedjets_flwr.seeds import derive

__all__ = ["adapt", "train"]


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Return the mixture: the specialist is trained alone (phase B), then with the gate (phase C).

    What comes out depends on the generalist, the client's samples and the seed, and on no round.
    """
    how, generalist = context.config.specialist, context.copy(0, vectors["expert.0"])
    specialist = own_start(context) if how.start == "scratch" else context.copy(0, vectors["expert.0"])
    fit_own(context, specialist)
    mixture = SpecialistMixture(
        gate_of(context), specialist.module, generalist.module, MIXES[how.mix], TRAINED[how.trains]
    )
    model = FlatModel(mixture)
    fit_own(context, model, how.lr, Losses(F.nll_loss, _total_nll))
    return Adapted(
        answering(model).predict, {"mixture": model.vector}, {"specialist-share": _share(context.on("test"), mixture)}
    )


def gate_of(context: ClientContext) -> nn.Module:
    """Return the client's gate at its start: both models answer alike."""
    architecture = context.runtime.architecture(0)
    assert isinstance(architecture, Architecture)
    seed = derive(context.config.run.seed, "specialist's gate", context.client)
    network = build(replace(architecture, num_classes=1), seed)
    gate = tail(network, context.config.moe.trainable) if context.config.specialist.gate == "network" else network[-1:]
    return silent(gate[0] if len(gate) == 1 else gate).to(context.device)


def _total_nll(scores: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(scores, targets, reduction="sum")


@torch.inference_mode()
def _share(context: ClientContext, mixture: SpecialistMixture) -> float:
    """Return the mean share of the specialist in the answers to a context's samples."""
    mixture.eval()
    inputs = context.plain_inputs()
    shares = [mixture.shares(inputs(rows)) for rows in torch.arange(len(context.data)).split(512)]
    return float(torch.cat(shares).mean())
