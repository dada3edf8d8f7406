"""Whole runs of a tenth of a second, through the real apps in this process, on clients of a few samples."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import server_app.app
from client_app.runtime import open_runtime
from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.models.pretraining import save_common_expert
from tests.support.faults import SMALL
from tests.support.in_process import Finished, InProcessGrid, run_in_process
from tests.support.tiny import TINY, common_expert

ROUNDS = 3


class TinyRunner:
    """Starts tiny runs below one folder; they leave no plots."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_app.app, "draw_plots", lambda folder: [])
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
