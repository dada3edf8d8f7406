"""FedMix-style local training: the mixture of all M experts, and how much of the client each expert answers for."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from client_app.algorithms import fedjets
from client_app.client import ClientContext, Update
from fedjets_flwr.moe.gating import scores


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train all experts and the gate jointly; report N_s p(z|s), the gate's mass per expert after training.

    The model is p(y|x) = sum_z p(z|x) p(y|x,z): the gate weights probabilities, in training as in its predictions.
    """
    update = fedjets.train(context, vectors, own_mix="probs")
    gate = context.gate(update.vectors)
    with torch.inference_mode():
        mass = scores(gate.module(context.data.embedding)).double().sum(dim=0)
    return replace(update, numbers={**update.numbers, "mass": mass.tolist()})
