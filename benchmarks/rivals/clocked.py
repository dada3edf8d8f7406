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
    from fedjets_flwr.wire.exchange import Exchange
    from strategies.fedjets import FedJets

    class ClockedExchange(Exchange):
        """Notes when the nodes are known."""

        folder: Path

        def wait_for_nodes(self, *given: Any, **named: Any) -> None:
            """Wait as ever."""
            super().wait_for_nodes(*given, **named)
            note(self.folder, "nodes known")

    class Clocked(FedJets):
        """FedJETs with marks."""

        local = "clocked"

        def initial_vectors(self) -> dict[str, Tensor]:
            """Start as ever."""
            note(self.config.run_dir, "method module imported", IMPORTED)
            note(self.config.run_dir, "run")
            self.exchange.__class__ = ClockedExchange
            self.exchange.folder = self.config.run_dir  # type: ignore[attr-defined]
            return super().initial_vectors()

        def configure_train(self, server_round, arrays, config, grid):  # type: ignore[no-untyped-def]
            """Note that everybody is prepared."""
            if server_round == 1:
                note(self.config.run_dir, "prepared")
            return super().configure_train(server_round, arrays, config, grid)

    METHOD = Clocked

else:
    from client_app.algorithms import fedjets as moe
    from client_app.client import Site
    from fedjets_flwr.wire.messages import Job, Number

    def train(
        site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Number]]:
        """Note the first step, then train as ever."""
        if server_round == 1:
            note(site.config.run_dir, "first step")
        return moe.train(site, job, server_round, vectors)
