"""Every client trains alone (control of Listo Zec et al. 2020, section 4): nothing is sent, nothing is averaged."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.partition import check_own_parts
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.runs.score import PARTICIPANTS_ACCURACY
from fedjets_flwr.wire.messages import Job
from strategies.base import IMAGES, TEXT, Routes, Strategy


class Local(Strategy):
    """No rounds and no state of the server's; a client's model stays with it, and is scored on its own test part."""

    algorithm = "local"
    learns: ClassVar[tuple[str, ...]] = (IMAGES, TEXT)
    init = "random"
    serves_unseen = False
    keeps_state = True
    score = PARTICIPANTS_ACCURACY

    @classmethod
    def validate(cls, config: Config) -> None:
        """Every client needs samples that stop its training, and samples that score it."""
        super().validate(config)
        check_own_parts(config)

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def cohort(self, server_round: int) -> Cohort:
        """Return nobody."""
        return Cohort((), (), server_round)

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Ask nobody."""
        return []

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return nothing: a client that never trained has no model."""
        return {}

    def personal(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Send nothing to a client that has its own model, or makes it now."""
        return dict.fromkeys(clients, ())


STRATEGY = Local
