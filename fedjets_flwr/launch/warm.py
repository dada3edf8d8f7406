"""A Flower of our own that stays for many runs: SuperLink, Ray and the clients' processes start once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.follow import check, find_room, follow_to_the_end, run_folder
from fedjets_flwr.launch.simulation import LocalFlower, Resources
from fedjets_flwr.launch.superlink import Launched
from fedjets_flwr.runs.queue import VARIABLE, RunQueue
from fedjets_flwr.runs.tracking import read_metrics


class WarmFlower:
    """Does runs one after the other; a context manager. An engine that ended is followed by another."""

    def __init__(self, log: Path, resources: Resources, console: Console, ray_address: str = "") -> None:
        """Begin; nothing is started before the first run.

        Args:
            log: takes what the SuperLink says.
            resources: of every run.
            console: where progress is shown.
            ray_address: of a Ray cluster that runs the clients; empty: this machine does.

        Raises:
            FedjetsError: no client fits, or there is no such cluster.
        """
        self._log, self._console = log, console
        self._federation, self._placement = find_room(resources, ray_address, console)
        self._flower: LocalFlower | None = None
        self._queue: RunQueue
        self._engine: Launched

    def __enter__(self) -> "WarmFlower":
        return self

    def __exit__(self, *_: object) -> None:
        if self._flower is not None:
            self._flower.__exit__()
            self._flower = None

    def run(self, config: Config) -> dict[str, Any]:
        """Do a run and return its summary.

        Raises:
            FedjetsError: the settings, the data or the run failed; one line that says why.
        """
        check(config)
        with run_folder(config, self._console) as folder:
            self._start(config)
            queued = Queued(self._engine, self._queue, self._queue.put(config.flat()), folder)
            try:
                return follow_to_the_end(queued, config, self._console)
            except FedjetsError:
                if not queued.over:  # the fault of what the runs need
                    self.__exit__()
                raise

    def _start(self, config: Config) -> None:
        if self._flower is not None and self._flower.alive():
            return
        self.__exit__()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        flower = QueueFlower(self._log, self._placement)
        flower.__enter__()
        self._flower, self._queue = flower, RunQueue(flower.queue)
        self._engine = flower.submit(config, flower.folder, self._federation)


class QueueFlower(LocalFlower):
    """One whose ServerApp works off a queue."""

    @property
    def queue(self) -> Path:
        """The folder of the queue."""
        return self.folder / "queue"

    def switches(self, home: Path) -> dict[str, str]:
        self.queue.mkdir()
        return super().switches(home) | {VARIABLE: str(self.queue)}


class Queued(Launched):
    """A run that waits in a queue, or is done from there."""

    def __init__(self, engine: Launched, queue: RunQueue, number: int, folder: Path) -> None:
        super().__init__(engine.superlink, engine.run_id, folder)
        self._queue, self._number = queue, number

    @property
    def over(self) -> bool:
        """Whether the ServerApp called the run ended."""
        return self._queue.answered(self._number) is not None

    def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield (what goes on before round 1, the records so far) until the ServerApp calls the run ended."""
        for text, records in super().watch():
            over = self.over
            yield text, read_metrics(self.folder) if over else records
            if over:
                return
        raise FedjetsError(f"Flower ended before the run{self.superlink.hint()}")

    def outcome(self) -> dict[str, Any]:
        if reason := self._queue.answered(self._number):
            raise FedjetsError(reason)
        return self.summary()

    def keep_log(self) -> None:
        """Do nothing: the ServerApp writes it."""
