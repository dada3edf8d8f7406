"""FedAvg (McMahan et al. 2017): one model for everybody, started from the common expert as in FedJETs' Table 1."""

from collections.abc import Sequence
from typing import ClassVar

from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.wire.messages import Job
from strategies.base import IMAGES, TEXT, Routes, Strategy


class FedAvg(Strategy):
    """One global model, averaged over a cohort that is drawn uniformly from all training clients."""

    algorithm = "fedavg"
    learns: ClassVar[tuple[str, ...]] = (IMAGES, TEXT)
    init = "common"

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client of the cohort the model."""
        return [Job(c, ("expert.0",), ("expert.0",), cost=self.num_samples[c]) for c in cohort.clients]

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return the model for every unseen client."""
        return dict.fromkeys(clients, ("expert.0",))


STRATEGY = FedAvg
