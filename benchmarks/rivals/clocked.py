"""Added to our app by the start-up benchmark: FedJETs that notes in ``clock`` of the run folder when it came how far.

One file for both sides of the app: as ``strategies/clocked.py`` it is the strategy, as
``client_app/algorithms/clocked.py`` the client algorithm.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

IMPORTED = time.time()


def note(folder: Path, mark: str, moment: float | None = None) -> None:
    """Append a mark and its time."""
    with (folder / "clock").open("a") as file:
        file.write(f"{mark}\t{moment or time.time()}\n")


if __name__.startswith("strategies."):
    from fedjets_flwr.federation.cohort import Cohort
    from fedjets_flwr.wire.exchange import Exchange
    from strategies.fedjets import FedJets

    class Clocked(FedJets):
        """FedJETs with marks."""

        algorithm = "clocked"

        def state(self) -> dict[str, Tensor]:
            """Start as ever; the nodes are waited for next."""
            folder, wait = self.config.run_dir, Exchange.wait_for_nodes
            note(folder, "method module imported", IMPORTED)
            note(folder, "run")

            def clocked(*given: Any, **named: Any) -> None:
                wait(*given, **named)
                note(folder, "nodes known")

            Exchange.wait_for_nodes = clocked  # type: ignore[method-assign]
            return super().state()

        def cohort(self, server_round: int) -> Cohort:
            """Note that everybody is prepared."""
            if server_round == 1:
                note(self.config.run_dir, "prepared")
            return super().cohort(server_round)

    STRATEGY = Clocked

else:
    from client_app.algorithms import fedjets
    from client_app.client import ClientContext, Update

    def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Note the first step, then train as ever."""
        if context.server_round == 1:
            note(context.config.run_dir, "first step")
        return fedjets.train(context, vectors)
