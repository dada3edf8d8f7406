"""Flower's own loop drives the rounds: the hooks do what Flower's documentation says of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedjets_flwr.runs.tracking import read_metrics
from server_app.rounds import Rounds
from tests.support.faults import same_weights
from tests.support.in_process import InProcessGrid
from tests.support.runs import ROUNDS, TinyRunner
from tests.support.tiny import tiny_method


class Sending(InProcessGrid):
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # type: ignore[override]
        return self.pull_messages(self.push_messages(messages))


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedjets"])
def test_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = TinyRunner(tmp_path, monkeypatch)
    ours, results = run(name, run__evaluate_every=1), []

    def flowers_own(self: Rounds, grid: Grid, **_: Any) -> Result:
        results.append(FlowerStrategy.start(self, grid, ArrayRecord(), num_rounds=ROUNDS))
        return results[-1]

    monkeypatch.setattr(Rounds, "start", flowers_own)
    flowers = run(name, Sending)
    assert same_weights(ours, flowers)
    records, (result,) = read_metrics(ours.config.run_dir), results
    for record in records:
        at = record["round"]
        assert result.train_metrics_clientapp[at]["loss"] == record["loss"]
        assert result.evaluate_metrics_clientapp[at]["accuracy"] == record["evaluation"]["accuracy"]
    assert len(records) == len(result.train_metrics_clientapp) == ROUNDS


def test_a_loop_that_is_told_no_round_begins_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, grid, done = tiny_method("fedavg").rounds, object(), []

    def note(self: Rounds, server_round: int, given: Grid) -> dict[str, object]:
        done.append((server_round, given))
        return {}

    monkeypatch.setattr(Rounds, "_round", note)
    rounds.start(cast(Grid, grid))
    assert done == [(t, grid) for t in range(1, rounds.config.run.rounds + 1)]
