"""One engine for many runs: what each does is what it does alone."""

import io
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedjets_flwr.launch.warm
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sources import parse_pairs
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.daemons import kill_daemon
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.launch.superlink import Launched, SuperLink
from fedjets_flwr.launch.warm import Queued, WarmFlower, find_room
from fedjets_flwr.runs.queue import Asked, RunQueue
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.started import TINY, finish


def tiny_run(folder: Path, name: str, *changes: str) -> Config:
    pairs = [*TINY, f"run.name={name}", f"run.cache-dir={folder / 'cache'}", f"run.output-dir={folder}", *changes]
    return Config.from_flat(parse_pairs(pairs))


@contextmanager
def engine_in(folder: Path) -> Iterator[tuple[WarmFlower, Display]]:
    console = Console(file=io.StringIO())
    room = find_room(Resources(), None, console)
    with WarmFlower(folder / "flower.log", room) as flower, Display(console) as display:
        yield flower, display


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in ("weights_hash", "accuracy", "bytes_down", "bytes_up", "chosen"):
        assert found[key] == wanted[key], key


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_of_one_engine_are_those_of_their_own_and_a_failed_one_costs_itself(tmp_path: Path) -> None:
    others = ["strategy.name=fedavg", "partition.clients=7", "run.seed=3", "train.lr=0.01"]
    with engine_in(tmp_path) as (flower, display):
        first = flower.run(tiny_run(tmp_path, "first"), display)
        engine = flower._engine
        with pytest.raises(FedjetsError, match="7 of 7 clients failed"):
            flower.run(tiny_run(tmp_path, "failed", "train.lr=1e30", "limits.max-failure-share=0.1"), display)
        second = flower.run(tiny_run(tmp_path, "second", *others), display)
        assert flower._engine is engine
        again = flower.run(tiny_run(tmp_path, "again"), display)
    same(again, first)
    assert first["weights_hash"] != second["weights_hash"]
    alone = [part for change in others for part in ("-c", change)]
    same(finish(tmp_path, "alone", *alone), second)
    log = (tmp_path / "second" / "run.log").read_text()
    assert "round 2/2" in log and "round 1/2" in log
    assert "failed" not in log
    assert (tmp_path / "failed" / "error.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", [0, 1], ids=["simulation", "SuperLink"])
def test_an_engine_that_is_killed_fails_its_run_and_is_followed_by_another(tmp_path: Path, which: int) -> None:
    with engine_in(tmp_path) as (flower, display):
        first = flower.run(tiny_run(tmp_path, "first"), display)
        kill(flower, which)
        same(flower.run(tiny_run(tmp_path, "again"), display), first)
        killer = threading.Thread(target=kill_in_round, args=(flower, which, tmp_path / "killed"))
        killer.start()
        with pytest.raises(FedjetsError, match="Flower ended before the run|stopped"):
            flower.run(tiny_run(tmp_path, "killed", "run.rounds=100000", "run.evaluate-every=100000"), display)
        killer.join()
        same(flower.run(tiny_run(tmp_path, "last"), display), first)


def kill(flower: WarmFlower, which: int) -> None:
    assert flower._flower is not None
    kill_daemon(flower._flower.daemons[which])


def kill_in_round(flower: WarmFlower, which: int, folder: Path) -> None:
    while not read_metrics(folder):
        time.sleep(0.1)
    kill(flower, which)


def test_a_stop_from_another_thread_is_an_interrupt_of_the_run(tmp_path: Path) -> None:
    stopping = threading.Event()
    run = Queued(Launched(SuperLink(), "1", tmp_path), RunQueue(tmp_path), 0, tmp_path, stopping)
    watched = run.watch()
    assert next(watched) == ("starting Flower", [])
    stopping.set()
    with pytest.raises(KeyboardInterrupt):
        next(watched)


def test_a_queue_hands_out_runs_in_their_order_and_ends_with_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = RunQueue(tmp_path)
    assert [queue.put({"run.seed": seed}, since=8.5) for seed in (5, 6)] == [0, 1]
    found = iter(RunQueue(tmp_path))
    assert next(found) == Asked(0, {"run.seed": 5}, 8.5)
    assert queue.answered(0) is None
    RunQueue(tmp_path).answer(0, "why")
    assert queue.answered(0) == "why"
    assert next(found) == Asked(1, {"run.seed": 6}, 8.5)
    RunQueue(tmp_path).answer(1)
    assert queue.answered(1) == ""
    monkeypatch.setattr(os, "getppid", lambda: 0)
    assert list(found) == []


def test_a_stop_while_an_engine_is_got_ready_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may stop all at any time; the folder that the engine has by then goes."""
    flower = WarmFlower(tmp_path / "flower.log", ("", None))  # type: ignore[arg-type]
    ended: list[bool] = []

    class Slow:
        def __init__(self, where: object) -> None: ...

        def prepare(self) -> None:
            flower.stop()
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            ended.append(True)

    monkeypatch.setattr(fedjets_flwr.launch.warm, "QueueFlower", Slow)
    with pytest.raises(KeyboardInterrupt):
        flower.start()
    assert ended == [True]
    flower.__exit__()
