"""Runs of an app through the real Flower, ours or a stock one, measured round by round."""

import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.paced import Paced, Stuck, alive, descendants
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.daemons import HUGE_PAGES, flower_environment
from fedjets_flwr.launch.simulation import LocalFlower, Resources
from fedjets_flwr.launch.superlink import stage_app, to_toml

RIVALS = Path(__file__).parent / "rivals"
STOCK = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "stock-fedavg"
version = "0.1.0"
description = "Flower's own FedAvg, state dicts as its quickstart sends them"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "stock"
[tool.flwr.app.components]
serverapp = "stock_app:server"
clientapp = "stock_app:client"
[tool.flwr.app.config]
"""


class Engine(Paced):
    """A simulation of its own: its server is paused between measurements, its idle nodes cost nothing.

    Attributes:
        started: when the command was given (monotonic seconds).
    """

    def __init__(self, flower: LocalFlower, lines: Path) -> None:
        super().__init__(lines, self._servers, lambda: self.running)
        self._flower, self._server, self.started = flower, 0, time.monotonic()

    def rounds(self, count: int, seconds: float = 300.0) -> list[float]:
        """Let it go on as :meth:`Paced.rounds` does.

        Raises:
            Stuck: they did not come, or a client failed in one, which saves it time.
        """
        known = len(self.records)
        measured = super().rounds(count, seconds)
        if failed := [record["failures"] for record in self.records[known:] if record["failures"]]:
            raise Stuck(f"{self._lines}: clients failed: {str(failed)[:500]}")
        return measured

    @property
    def running(self) -> bool:
        """Whether Flower runs, and its simulation has not ended."""
        return self._flower.alive() and (not self._server or alive(self._server))

    def processes(self) -> dict[int, str]:
        """Return every process of this simulation by id."""
        return {pid: words for daemon in self._flower.daemons for pid, words in descendants(daemon.pid).items()}

    def _servers(self) -> list[int]:
        return [self.server] if self.server else []

    @property
    def server(self) -> int:
        """Process that runs the ServerApp and drives the simulation, 0 before it is there."""
        if not self._server:
            programs = ("ready_simulation.py", "flwr-simulation")
            found = [pid for pid, words in self.processes().items() if any(name in words for name in programs)]
            self._server = found[-1] if found else 0  # what starts and guards it, above it, has its command, too
        return self._server

    @property
    def nodes(self) -> list[int]:
        """Processes that run the ClientApp; Ray does not always manage to name them after it."""
        workers = {pid: words for pid, words in self.processes().items() if "raylet/raylet" not in words}
        named = [pid for pid, words in workers.items() if words.startswith("ray::ClientAppActor")]
        return named or [pid for pid, words in workers.items() if "workers/default_worker.py" in words]


class LateFlower(LocalFlower):
    """Flower starts its Ray, once it has the app: clients' processes find what was added to that, too."""

    def switches(self, home: Path) -> dict[str, str]:
        ours = {"PATH", "PYTHONPATH", "RAY_preload_python_modules"}
        found = {name: value for name, value in super().switches(home).items() if name not in ours}
        return flower_environment(home) | found


class StockFlower(LateFlower):
    """Flower as its own commands start it."""

    def switches(self, home: Path) -> dict[str, str]:
        return {name: value for name, value in super().switches(home).items() if name not in HUGE_PAGES}


@contextmanager
def ours(config: Config, resources: Resources, extra: Mapping[str, Path] | None = None) -> Iterator[Engine]:
    """Run this app in the processes of ``fedjets run``; ``extra`` are files added to the app, by their place in it."""
    (config.run_dir / "app").mkdir(parents=True)
    app = stage_app(config.run_dir / "app" / "fedjets-flwr")
    for place, source in (extra or {}).items():
        shutil.copy(source, app / place)
    kind = LateFlower if extra else LocalFlower
    yield from _run(kind, app, config.flat(), resources, config.run_dir / "metrics.jsonl")


@contextmanager
def stock(folder: Path, settings: Mapping[str, Scalar], resources: Resources) -> Iterator[Engine]:
    """Run Flower's own FedAvg (``rivals/stock_app.py``) with these settings."""
    app, lines = folder / "app" / "stock-fedavg", folder / "lines.jsonl"
    app.mkdir(parents=True)
    settings = {**settings, "lines": str(lines)}
    (app / "pyproject.toml").write_text(STOCK + to_toml(settings))
    shutil.copy(RIVALS / "stock_app.py", app)
    yield from _run(StockFlower, app, settings, resources, lines)


def _run(
    kind: type[LocalFlower], app: Path, settings: Mapping[str, Scalar], resources: Resources, lines: Path
) -> Iterator[Engine]:
    chosen = app.parent / "settings.toml"
    chosen.write_text(to_toml(settings))
    begun = time.monotonic()
    leftover: Iterable[int] = ()
    try:
        federation, ray = resources.here()
        with kind(ray) as flower:
            flower.keep_log(app.parent / "flower.log")
            reply = flower.cli(
                "run", str(app), "own", "--run-config", str(chosen), "--federation-config", federation,
                "--format", "json",
            )  # fmt: skip
            engine = Engine(flower, lines)
            engine.started = begun
            try:
                yield engine
            except Exception:
                engine.resume()
                print(flower.call("log", str(reply["run-id"]), "own", "--show").stdout[-3000:])
                raise
            finally:
                engine.resume()
                leftover = engine.processes()
    finally:
        end(leftover)


def end(pids: Iterable[int], seconds: float = 10.0) -> None:
    """Wait for processes that lost their parent to end, then end them."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        if alive(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
