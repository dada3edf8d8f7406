"""Simulated attackers, to measure what robust aggregation is worth; they exist in a simulation alone.

A share of the training clients, drawn from the seed, has its data or its update swapped around every training.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from client_app.client import ClientContext, Update, Work
from fedjets_flwr.config.schema import Config
from fedjets_flwr.names import expert_ids
from fedjets_flwr.seeds import numpy_generator

Poison = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(what the client was sent, what honest training made of it, draws) -> what it replies."""

BOOST = 10.0
"""Factor of the boosted attacks."""


def sign_flip(sent: Tensor, trained: Tensor, generator: torch.Generator) -> Tensor:
    """Return the honest update reversed and boosted."""
    return sent - BOOST * (trained - sent)


def gaussian(sent: Tensor, trained: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise of a boosted update's size."""
    noise = torch.randn(sent.shape, generator=generator)
    poisoned_update: Tensor = sent + noise * (BOOST * (trained - sent).norm() / noise.norm())
    return poisoned_update


def replacement(sent: Tensor, trained: Tensor, generator: torch.Generator) -> Tensor:
    """Return an update that, averaged with nine others, puts the attacker's model in place (Bagdasaryan 2020)."""
    return sent + BOOST * (-trained - sent)


POISONS: dict[str, Poison] = {"sign-flip": sign_flip, "gaussian": gaussian, "replacement": replacement}


def attackers(config: Config) -> frozenset[int]:
    """Return the ids of the training clients that attack."""
    clients = config.partition.clients
    count = round(config.attack.share * clients) if config.attack.kind != "none" else 0
    return frozenset(numpy_generator(config.run.seed, "attackers").choice(clients, count, replace=False).tolist())


def poisoned(train: Work) -> Work:
    """Return a client algorithm whose attackers poison what they reply."""

    def attack(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        if context.client not in attackers(context.config):
            return train(context, vectors)
        kind = context.config.attack.kind
        if kind == "label-flip":
            flipped = replace(context.data, targets=flip(context.data.targets, context.num_classes))
            return train(replace(context, data=flipped), vectors)
        update, generator = train(context, vectors), context.generator("attack")
        poisoned_vectors = {
            name: _poisoned(POISONS[kind], vectors[name], vector.cpu(), _trained(context, name, vector), generator)
            for name, vector in update.vectors.items()
        }
        return replace(update, vectors=poisoned_vectors)

    return attack


def _poisoned(poison: Poison, sent: Tensor, trained: Tensor, weights: int, generator: torch.Generator) -> Tensor:
    """Return a vector whose weights are poisoned; running statistics stay, since ruined ones give an attacker away."""
    return torch.cat([poison(sent[:weights], trained[:weights], generator), trained[weights:]])


def _trained(context: ClientContext, name: str, vector: Tensor) -> int:
    """Return how many numbers of a vector are weights; they come first."""
    ids, specs = expert_ids([name]), context.runtime.specs
    return specs[ids[0] if len(specs) > 1 else 0].trained if ids else vector.numel()


def flip(labels: Tensor, num_classes: int) -> Tensor:
    """Return every label y as C - 1 - y."""
    return num_classes - 1 - labels
