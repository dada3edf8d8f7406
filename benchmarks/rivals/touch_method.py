"""Added to our app by the transport benchmark: FedJETs' traffic of vectors, without training and without routing."""

from collections.abc import Sequence

from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.wire.messages import Job
from strategies.base import Routes
from strategies.fedjets import FedJets


class Touch(FedJets):
    """Anchors get their expert, every normal client the K experts that follow its id."""

    algorithm = "touch"
    routed = False

    def to_route(self, cohort: Cohort) -> Sequence[int]:
        """Nobody."""
        return ()

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Choose without asking."""
        return super().plan(cohort, self._chosen(cohort.normals))

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Choose without asking."""
        return super().serve(clients, self._chosen(clients))

    def _chosen(self, clients: Sequence[int]) -> Routes:
        k, count = self.config.moe.top_k, self.num_experts
        return {client: tuple(sorted((client + i) % count for i in range(k))) for client in clients}


STRATEGY = Touch
