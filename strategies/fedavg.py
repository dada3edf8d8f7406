"""FedAvg (McMahan et al. 2017): one model for everybody, started from the common expert as in FedJETs' Table 1."""

from collections.abc import Sequence

from fedjets_flwr.wire.messages import Job
from strategies.base import Method


class FedAvg(Method):
    """One global model, averaged over a cohort that is drawn uniformly from all training clients."""

    local = "fedavg"
    init = "common"

    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Give every client of the cohort the model."""
        clients = sorted([*anchors, *normals])
        return [Job(client, ("expert.0",), ("expert.0",), cost=self.samples[client]) for client in clients]

    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return the model for every unseen client."""
        return dict.fromkeys(clients, ("expert.0",))


METHOD = FedAvg
