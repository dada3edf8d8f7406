"""A Flower of our own that stays for many runs, or one: SuperLink, Ray and the clients' processes start once.

Several of them do runs at once; a stop from another thread ends a run as a Ctrl-C does in the main one.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import LifoQueue
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.own_ray import OwnRay
from fedjets_flwr.launch.peers import tell_who_reaches
from fedjets_flwr.launch.ray_cluster import Placement, find_cluster
from fedjets_flwr.launch.simulation import LocalFlower, Resources
from fedjets_flwr.launch.superlink import Launched
from fedjets_flwr.runs.queue import VARIABLE, RunQueue
from fedjets_flwr.runs.tracking import read_metrics

if TYPE_CHECKING:  # an engine starts before that is needed
    from fedjets_flwr.launch.display import Display

Room = tuple[str, OwnRay | Placement]
"""Flower's ``--federation-config``, and where clients' processes go."""


class WarmFlower:
    """Does runs one after the other; a context manager. An engine that ended is followed by another."""

    def __init__(self, log: Path, room: Room) -> None:
        """Begin; nothing is started before the first run, or :meth:`start`.

        Args:
            log: takes what Flower said, in a folder that is there after the first run's start.
            room: for every run, as :func:`find_room` finds it.
        """
        self._log = log
        self._federation, self._where = room
        self._flower: QueueFlower | None = None
        self._engine: Future[Launched]
        self._threads = ThreadPoolExecutor(1)
        self._stopping = Event()
        self._since: float | None = None

    def __enter__(self) -> "WarmFlower":
        return self

    def __exit__(self, *_: object) -> None:
        flower, self._flower = self._flower, None
        if flower is not None:
            flower.__exit__()
            with suppress(Exception):  # it was told where it was waited for
                self._engine.result()
            flower.__exit__()

    def start(self) -> None:
        """Have an engine start, unless one runs, beside what this process does next: somebody waits from now on."""
        self._since = self._since or time.time()
        if self._flower is not None and not (self._engine.done() and not self._flower.alive()):
            return
        self.__exit__()
        flower = QueueFlower(self._where)
        try:
            flower.prepare()
        except BaseException:
            flower.__exit__()
            raise
        # In this order: another thread that stops all may look at any time.
        self._engine = self._threads.submit(flower.begin, self._federation)
        self._flower = flower

    def stop(self) -> None:
        """Have the run that another thread waits for end as by Ctrl-C; this returns at once, and no run follows."""
        self._stopping.set()
        if self._flower is not None and not self._engine.done():
            self._flower.__exit__()

    def run(self, config: Config, display: "Display") -> dict[str, Any]:
        """Do a run, draw its pictures and return its summary.

        Args:
            config: the settings.
            display: where progress is shown.

        Raises:
            FedjetsError: the settings, the data or the run failed; one line that says why.
            KeyboardInterrupt: it was stopped.
        """
        heed(self._stopping)
        self.start()
        since, self._since = self._since, None
        assert since is not None
        # Now, beside the engine's start: these import torch.
        from fedjets_flwr.launch.follow import check, follow_to_the_end, run_folder
        from fedjets_flwr.report.plots import draw_or_say, get_ready

        check(config)
        with run_folder(config, display) as folder:
            flower = self._flower
            assert flower is not None
            flower.keep_log(self._log)
            try:
                engine = self._engine.result()
            except FedjetsError as error:
                self.__exit__()
                heed(self._stopping)
                raise FedjetsError(f"{error}{flower.hint()}") from None
            heed(self._stopping)
            number = flower.runs.put(self._where.told(config), since)
            queued = Queued(engine, flower.runs, number, folder, self._stopping)
            self._threads.submit(get_ready)  # for the pictures; this process waits anyway
            try:
                summary = follow_to_the_end(queued, config, display)
            except BaseException:
                if not queued.over:  # the fault of what the runs need, or the ServerApp does not heed a stop just now
                    self.__exit__()  # before what it was to replace comes back
                raise
            draw_or_say(folder, partial(display.tell, config.run_name))
            return summary


class WarmFlowers:
    """Several, each of which does a run at a time; a context manager."""

    def __init__(self, log: Path, room: Room, count: int) -> None:
        """Begin; nothing is started before there is a run for it.

        Args:
            log: takes what the first one said; those of the others are beside it, with numbers.
            room: for every run of each, as :func:`find_room` finds it.
            count: how many.
        """
        logs = [log, *(log.with_stem(f"{log.stem}-{number}") for number in range(2, count + 1))]
        federation, where = room
        self._all = [WarmFlower(path, (federation, where.of(number))) for number, path in enumerate(logs)]
        self._free = LifoQueue[WarmFlower]()  # the last one is warm
        for flower in reversed(self._all):
            self._free.put(flower)

    def __enter__(self) -> "WarmFlowers":
        return self

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(len(self._all)) as threads:
            list(threads.map(WarmFlower.__exit__, self._all))

    def run(self, config: Config, display: "Display") -> dict[str, Any]:
        """Do a run on one that is free, as :meth:`WarmFlower.run` does; wait until there is one."""
        flower = self._free.get()
        try:
            return flower.run(config, display)
        finally:
            self._free.put(flower)

    def stop(self) -> None:
        """Have all runs that other threads wait for end as by Ctrl-C; this returns at once, and no run follows."""
        for flower in self._all:
            flower.stop()


class QueueFlower(LocalFlower):
    """One whose ServerApp works off a queue.

    Attributes:
        runs: the queue.
    """

    runs: RunQueue

    def switches(self, home: Path) -> dict[str, str]:
        queue = self.folder / "queue"
        queue.mkdir()
        self.runs = RunQueue(queue)
        return super().switches(home) | {VARIABLE: str(queue)}

    def begin(self, federation: str) -> Launched:
        """Start all, and return the Flower run that does those of the queue; its own settings are nobody's.

        Whatever comes of it, :meth:`__exit__` ends all.

        Args:
            federation: Flower's ``--federation-config``.

        Raises:
            FedjetsError: Flower did not start, or refused.
        """
        self.prepare()
        self.launch()
        return self.submit(Config(), self.folder, federation)


class Queued(Launched):
    """A run that waits in a queue, or is done from there."""

    def __init__(self, engine: Launched, queue: RunQueue, number: int, folder: Path, stopping: Event) -> None:
        super().__init__(engine.superlink, engine.run_id, folder)
        self._queue, self._number, self._stopping = queue, number, stopping

    @property
    def over(self) -> bool:
        """Whether the ServerApp called the run ended."""
        return self._queue.answered(self._number) is not None

    def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield (what goes on before round 1, the records so far) until the ServerApp calls the run ended."""
        for text, records in super().watch():
            heed(self._stopping)
            over = self.over
            yield text, read_metrics(self.folder) if over else records
            if over:
                return
            if not self.superlink.alive():
                break
        why = ""
        with suppress(FedjetsError, LookupError):
            why = f": {self.facts()['status-details']}"
        raise FedjetsError(f"Flower ended before the run did{why}{self.superlink.hint()}; go on with --resume")

    def outcome(self) -> dict[str, Any]:
        if reason := self._queue.answered(self._number):
            raise FedjetsError(reason)
        return self.summary()

    def keep_log(self) -> None:
        """Do nothing: the ServerApp writes it."""


def heed(stopping: Event) -> None:
    """Raise KeyboardInterrupt once another thread asked for it: signals come to the main one alone."""
    if stopping.is_set():
        raise KeyboardInterrupt


def find_room(resources: Resources, ray_address: str | None, console: Console) -> Room:
    """Return the room for simulations, and say who gets in.

    Args:
        resources: of each.
        ray_address: of a Ray cluster that runs the clients; None: this machine does.
        console: where it is said.

    Raises:
        FedjetsError: no client fits, or there is no such cluster.
    """
    tell_who_reaches(console)
    if ray_address is None:
        return resources.here()
    federation, placement = resources.on(find_cluster(ray_address))
    nodes = len(set(placement.nodes))
    console.print(f"{len(placement.nodes)} clients at a time on {nodes} nodes of the Ray cluster {placement.address}")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        console.print("the Ray cluster asks for no token: whoever reaches it can run code there; see docs/cluster.md")
    return federation, placement
