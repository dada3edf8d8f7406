"""Whole runs of a tenth of a second, through the real apps in this process, on clients of a few samples."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import server_app.app
from client_app.runtime import open_runtime
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.runs.run_folder import read_recorded
from tests.support.faults import SMALL
from tests.support.in_process import Finished, InProcessGrid, run_in_process
from tests.support.tiny import TINY, common_expert

ROUNDS = 3


class TinyRunner:
    """Starts tiny runs below one folder; they leave no plots."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_app.app, "draw_or_say", lambda folder, say: None)
        self.folder, self.monkeypatch, self.numbers = folder, monkeypatch, itertools.count()
        save_common_expert(common_expert(), folder / "common.safetensors")

    def __call__(self, name: str, grid: type[InProcessGrid] = InProcessGrid, /, **changes: Scalar) -> Finished:
        open_runtime.cache_clear()
        own: dict[str, Scalar] = {"strategy.name": name, "common-expert.path": str(self.folder / "common.safetensors")}
        own |= {"run.name": f"run{next(self.numbers)}", "run.rounds": ROUNDS, "run.evaluate-every": 2}
        flat = {key.replace(".", "__").replace("-", "_"): value for key, value in (TINY | own).items()}
        finished = run_in_process(self.folder, self.monkeypatch, grid, **flat | changes)
        finished.let_go()
        return finished


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    """Return what does tiny runs below one folder."""
    return TinyRunner(tmp_path, monkeypatch)


def participants(run: Finished) -> dict[str, Any]:
    """Return what a summary says of the clients that train and were scored on tests of their own."""
    found: dict[str, Any] = read_recorded(run.config.run_dir).results["participants"]
    return found


Run = Callable[..., Finished]
"""Name of a method, changes -> its run, of a second, from the common expert on."""


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what does small runs below one folder, which share their common experts and embeddings."""
    cache, numbers = tmp_path_factory.getbasetemp() / "shared-cache", itertools.count()

    def start(name: str, **changes: Scalar) -> Finished:
        own: dict[str, Scalar] = {"run__cache_dir": str(cache), "run__name": f"run{next(numbers)}"}
        usual = {key: value for key, value in SMALL.items() if key != "transport__name"}
        return run_in_process(tmp_path, monkeypatch, **usual | {"strategy__name": name} | own | changes)

    return start
