"""Whole runs of a tenth of a second, through the real apps in this process, on clients of a few samples."""

import itertools
from pathlib import Path

import pytest

import server_app.app
from client_app.runtime import open_runtime
from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.models.pretraining import save_common_expert
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
