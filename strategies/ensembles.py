"""Average ensembles (FedJETs, Table 1): independent FedAvg models whose probabilities are averaged."""

from collections.abc import Sequence

from fedjets_flwr.federation.cohort import Cohort, draw_cohort
from fedjets_flwr.names import expert_name
from fedjets_flwr.wire.messages import Job
from strategies.base import Routes, Strategy


class Ensembles(Strategy):
    """Members differ in cohorts, batch order and augmentation; the first one is FedAvg of the same seed."""

    algorithm = "fedavg"
    read_out = "mean"
    init = "common"
    private = False

    @property
    def num_experts(self) -> int:
        """Members."""
        return self.config.ensembles.members

    def cohort(self, server_round: int) -> Cohort:
        """Return the clients of all members' cohorts, as normal ones."""
        return Cohort((), tuple(sorted({c for drawn in self._members(server_round) for c in drawn})), server_round)

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client the members that drew it; each model trains by itself."""
        drawn = {expert_name(member): clients for member, clients in enumerate(self._members(cohort.server_round))}
        held = {c: tuple(name for name, clients in drawn.items() if c in clients) for c in cohort.clients}
        return [Job(c, names, names, cost=self.num_samples[c] * len(names)) for c, names in held.items()]

    def _members(self, server_round: int) -> list[list[int]]:
        """Return the cohort of each member."""
        return [
            draw_cohort(self.config, server_round, self.drawn, self.anchors, member, self.opted_out).clients
            for member in range(self.num_experts)
        ]

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return all members for every unseen client."""
        return dict.fromkeys(clients, self.expert_names)


STRATEGY = Ensembles
