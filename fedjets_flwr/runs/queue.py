"""Runs one after the other in one Flower run: a folder that the launcher fills and the ServerApp works off.

What takes the time of a short run is the start of SuperLink, Ray and the clients' processes. A ServerApp that finds a
queue in its environment does all the runs that come, in processes that stay.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.files import written
from fedjets_flwr.runs.stopping import Parent

VARIABLE = "FEDJETS_QUEUE"
"""The environment variable that names the folder; no setting, since only a simulation of one's own may have it."""
_LOOK = 0.05


@dataclass(frozen=True)
class Asked:
    """A run that is asked for.

    Attributes:
        number: its place in the queue.
        settings: of it.
        since: when somebody began to wait for it, in seconds since 1970.
    """

    number: int
    settings: dict[str, Scalar]
    since: float


class RunQueue:
    """Settings of runs, numbered from 0, each answered once by how its run ended."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._put = folder, 0

    @classmethod
    def here(cls) -> "RunQueue | None":
        """Return the queue of this process, if it has one."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def put(self, settings: Mapping[str, Scalar], since: float) -> int:
        """Add a run, for which somebody waits since then, and return its number."""
        self._write(f"{self._put}.json", json.dumps({"settings": dict(settings), "since": since}))
        self._put += 1
        return self._put - 1

    def __iter__(self) -> Iterator[Asked]:
        """Yield each run, waiting for the next one, until the launcher is gone."""
        number, parent = 0, Parent()
        while not parent.gone():
            path = self._folder / f"{number}.json"
            if path.is_file():
                yield Asked(number, **json.loads(path.read_text()))
                number += 1
            else:
                time.sleep(_LOOK)

    def answer(self, number: int, reason: str = "") -> None:
        """Tell that a run has ended, and why it failed."""
        self._write(f"{number}.done", json.dumps(reason))

    def answered(self, number: int) -> str | None:
        """Return why a run failed, nothing if it did not, or None as long as it goes on."""
        path = self._folder / f"{number}.done"
        return str(json.loads(path.read_text())) if path.is_file() else None

    def _write(self, name: str, text: str) -> None:
        with written(self._folder / name) as file:
            file.write_text(text)
