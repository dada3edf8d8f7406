"""Average ensembles (FedJETs, Table 1): independent FedAvg models whose probabilities are averaged."""

from collections import defaultdict
from collections.abc import Sequence

from fedjets_flwr.wire.messages import Job
from server_app.cohort import draw_cohort
from strategies.base import Method


class Ensembles(Method):
    """Members differ in cohorts, batch order and augmentation; the first one is FedAvg of the same seed."""

    local = "supervised"
    read_out = "mean"
    init = "common"
    private = False

    @property
    def num_experts(self) -> int:
        """Members."""
        return self.config.ensembles.members

    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Draw a cohort for each member; a client in several of them trains each model by itself."""
        everyone: set[int] = set()
        held: dict[int, list[str]] = defaultdict(list)
        for member in range(self.num_experts):
            drawn = draw_cohort(self.config, server_round, self.drawn, self.anchors, member)
            clients = [*drawn[0], *drawn[1]]
            everyone.update(clients)
            for client in self._prepared(clients):
                held[client].append(f"expert.{member}")
        self.cohort = ([], sorted(everyone))
        return [
            Job(client, tuple(names), tuple(names), cost=self.samples[client] * len(names))
            for client, names in sorted(held.items())
        ]

    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return all members for every unseen client."""
        return dict.fromkeys(clients, tuple(f"expert.{m}" for m in range(self.num_experts)))


METHOD = Ensembles
