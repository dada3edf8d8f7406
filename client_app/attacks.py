"""Simulated attackers, to measure what robust aggregation is worth. Off unless ``attack.kind`` names one.

A share of the training clients, drawn from the seed, answers every train message with poisoned vectors.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from client_app.algorithms import Train
from client_app.client import Site
from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import numpy_generator, torch_generator
from fedjets_flwr.wire.messages import Job, Number

Poison = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(what the client was sent, what honest training made of it, draws) -> what it answers."""

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


def poisoned(train: Train) -> Train:
    """Return a local algorithm whose attackers poison what they answer."""

    def attack(
        site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Number]]:
        if job.client not in attackers(site.config):
            return train(site, job, server_round, vectors)
        kind = site.config.attack.kind
        if kind == "label-flip":
            with site.relabelled(job.client, flip):
                return train(site, job, server_round, vectors)
        trained, numbers = train(site, job, server_round, vectors)
        generator = torch_generator(site.config.run.seed, "attack", server_round, job.client)
        return {name: POISONS[kind](vectors[name], v.cpu(), generator) for name, v in trained.items()}, numbers

    return attack


def flip(labels: Tensor, num_classes: int) -> Tensor:
    """Return every label y as C - 1 - y."""
    return num_classes - 1 - labels
