"""Average ensembles (FedJETs, Table 1): independent FedAvg models whose probabilities are averaged."""

from collections.abc import Sequence

from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.wire.messages import Job
from strategies.base import Method


class Ensembles(Method):
    """Members differ in cohorts, batch order and augmentation; the first one is FedAvg of the same seed."""

    local = "fedavg"
    read_out = "mean"
    init = "common"
    private = False

    @property
    def num_experts(self) -> int:
        """Members."""
        return self.config.ensembles.members

    def draw(self, server_round: int) -> tuple[list[int], list[int]]:
        """Return the clients of all members' cohorts, as normal ones."""
        return [], sorted({client for member in range(self.num_experts) for client in self._of(member, server_round)})

    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Give every client the members that drew it; each model trains by itself."""
        drawn = {f"expert.{member}": self._of(member, server_round) for member in range(self.num_experts)}
        held = {client: tuple(name for name, clients in drawn.items() if client in clients) for client in normals}
        return [Job(c, names, names, cost=self.samples[c] * len(names)) for c, names in held.items()]

    def _of(self, member: int, server_round: int) -> list[int]:
        """Return the cohort of a member."""
        anchors, normals = draw_cohort(self.config, server_round, self.drawn, self.anchors, member)
        return [*anchors, *normals]

    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return all members for every unseen client."""
        return dict.fromkeys(clients, tuple(f"expert.{m}" for m in range(self.num_experts)))


METHOD = Ensembles
