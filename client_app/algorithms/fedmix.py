"""FedMix-style local training: the mixture of all M experts, and how much of the client each expert answers for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.algorithms import fedjets as moe
from client_app.client import Site
from fedjets_flwr.moe.gating import scores
from fedjets_flwr.wire.messages import Job, Number


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Train all experts and the gate jointly; report N_s p(z|s), the gate's mass per expert after training.

    The model is p(y|x) = sum_z p(z|x) p(y|x,z): the gate weights probabilities, in training as in the answers.
    """
    trained, numbers = moe.train(site, job, server_round, vectors, own_mix="probs")
    gate = site.gate(trained["gate"], site.config.moe.experts)
    with torch.inference_mode():
        mass = scores(gate.module(site.local(job.client).embedding)).double().sum(dim=0)
    return trained, numbers | {"mass": mass.tolist()}
