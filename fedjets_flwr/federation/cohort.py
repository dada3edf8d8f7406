"""Which clients take part in a round."""

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import numpy_generator


@dataclass(frozen=True)
class Cohort:
    """The clients of a round, each kind in ascending order; an anchor that was drawn as one of all counts as normal."""

    anchors: tuple[int, ...]
    normals: tuple[int, ...]
    server_round: int

    def only(self, clients: Container[int]) -> "Cohort":
        """Return the cohort without the clients that are not among ``clients``."""
        anchors, normals = (tuple(c for c in kind if c in clients) for kind in (self.anchors, self.normals))
        return Cohort(anchors, normals, self.server_round)

    @property
    def clients(self) -> list[int]:
        """All of them in ascending order."""
        return sorted([*self.anchors, *self.normals])


def draw_participants(config: Config) -> list[int]:
    """Return the training clients that are scored on their own test parts, in ascending order (``participants.*``)."""
    training, count = config.partition.clients, config.participants.clients
    if not 0 < count < training:
        return list(range(training))
    return sorted(numpy_generator(config.run.seed, "participants").choice(training, count, replace=False).tolist())


def draw_cohort(
    config: Config,
    server_round: int,
    sampling: str,
    all_anchors: Sequence[int],
    member: int = 0,
    without: Collection[int] = (),
) -> Cohort:
    """Return the cohort of a round.

    Args:
        config: ``cohort.*`` and ``partition.*``.
        server_round: decides the draw.
        sampling: ``anchored``: N_a anchors + N_c of the others (FedJETs, Algorithm 1); ``uniform``: N_a + N_c of all
            clients, where anchors that happen to be drawn count as normal; ``one-per-domain``: one of the clients of
            each domain of text, which hold them in turn (the "enforced" settings of FedMoE).
        all_anchors: ids of all anchor clients.
        member: which of several independent models draws (an ensemble's member).
        without: training clients that take no part.
    """
    rng = numpy_generator(config.run.seed, "cohort", server_round, member)
    willing = _others(np.arange(config.partition.clients), without)

    def draw(clients: NDArray[np.int64], count: int) -> tuple[int, ...]:
        drawn = rng.choice(len(clients), min(count, len(clients)), replace=False)
        return tuple(sorted(clients[drawn].tolist()))

    if sampling == "uniform":
        return Cohort((), draw(willing, config.cohort.anchors + config.cohort.normals), server_round)
    if sampling == "one-per-domain":
        domains = np.array([config.domain_of(client) for client in willing.tolist()], dtype=np.int64)
        alike = [willing[domains == domain] for domain in range(len(config.text_domains))]
        return Cohort((), tuple(sorted(client for clients in alike for client in draw(clients, 1))), server_round)
    anchors = draw(_others(np.array(all_anchors, dtype=np.int64), without), config.cohort.anchors)
    return Cohort(anchors, draw(_others(willing, all_anchors), config.cohort.normals), server_round)


def _others(clients: NDArray[np.int64], without: Collection[int]) -> NDArray[np.int64]:
    """Return those of some clients that are not among others, in their order; of many thousands in every round."""
    last = clients.max(initial=-1)
    known = [client for client in without if client <= last]  # a site may claim a client with any number
    return clients[np.isin(clients, np.array(known, dtype=np.int64), invert=True)]
