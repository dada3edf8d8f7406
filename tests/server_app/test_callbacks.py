"""Callbacks of other packages are told what happens, as an installed package names them."""

import time
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs import callback
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.runs.tracking import read_metrics
from strategies.fedavg import FedAvg
from tests.support.runs import ROUNDS, TinyRunner

TOLD: list[tuple[str, Any]] = []


class Notes(Callback):
    def __init__(self, config: Config) -> None:
        TOLD.append(("made", config.run.rounds))

    def on_round(self, record: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
        TOLD.append(("round", (record["round"], record.get("metrics"), sorted(vectors))))

    def on_broken_off(self, server_round: int, vectors: Mapping[str, Tensor]) -> None:
        TOLD.append(("broken off", server_round))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        TOLD.append(("end", summary["status"]))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    TOLD.clear()
    entry = EntryPoint("notes", f"{__name__}:Notes", callback.GROUP)
    monkeypatch.setattr(callback, "entry_points", lambda group: [entry] if group == "fedjets.callbacks" else [])


def stepping(self: FedAvg, server_round: int) -> Mapping[str, float]:
    if server_round == 3:
        raise FedjetsError("the server's own step failed")
    time.sleep(0.05)
    return {"step": 0.5 * server_round}


@pytest.mark.usefixtures("installed")
def test_a_callback_hears_of_every_round_and_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TinyRunner(tmp_path, monkeypatch)("fedavg")
    rounds = [("round", (t, None, ["expert.0"])) for t in range(1, ROUNDS + 1)]
    assert [("made", ROUNDS), *rounds, ("end", "completed")] == TOLD


@pytest.mark.usefixtures("installed")
def test_the_servers_own_step_has_metrics_and_its_failure_is_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FedAvg, "after_merge", stepping)
    run = TinyRunner(tmp_path, monkeypatch)
    with pytest.raises(FedjetsError, match="own step failed"):
        run("fedavg")
    assert TOLD[1:] == [
        ("round", (1, {"step": 0.5}, ["expert.0"])), ("round", (2, {"step": 1.0}, ["expert.0"])), ("broken off", 2),
    ]  # fmt: skip
    (folder,) = (tmp_path / "runs").iterdir()
    assert [record.get("metrics") for record in read_metrics(folder)] == [{"step": 0.5}, {"step": 1.0}]
    for record in read_metrics(folder):
        assert record["seconds"]["server"] == pytest.approx(0.05, abs=0.04)
