"""Runs that are killed again and again, and actors that die, through the real engine."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fedjets_flwr.runs.audit import AUDIT_LOG, verify
from tests.support.processes import descendants, kill
from tests.support.started import finish, start

LONG = ("-c", "run.rounds=60", "-c", "run.evaluate-every=20", "-c", "run.checkpoint-every=2")


OWN = (
    "-c", "partition.name=majority", "-c", "partition.samples-per-client=40", "-c", "partition.val-share=0.25",
    "-c", "partition.test-share=0.25", "-c", "moe.trainable=all", "-c", "adapt.max-epochs=20",
    "-c", "participants.evaluate-every=15",
)  # fmt: skip
"""Clients that make models of their own, from time to time."""


def kill_and_resume(folder: Path, times: int, longest: float, *settings: str) -> None:
    """Kill a run again and again and start it anew; it may end well between two kills."""
    rng, kills = random.Random(1), 0
    while kills < times:
        process = start(folder, "killed", "--resume", *settings)
        try:
            process.wait(timeout=rng.uniform(4, longest))
        except subprocess.TimeoutExpired:
            if rng.random() < 0.5:
                kill(process)
            else:  # the launcher alone: its guard ends the rest, the lock keeps the next run waiting meanwhile
                process.kill()
                process.communicate(timeout=60)
            kills += 1
            continue
        assert process.returncode == 0, process.communicate()[1]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    unbroken = finish(tmp_path, "unbroken", *LONG)
    kill_and_resume(tmp_path, 20, 32, *LONG)
    broken = finish(tmp_path, "killed", "--resume", *LONG)
    assert broken["weights_hash"] == unbroken["weights_hash"]
    assert broken["accuracy"] == unbroken["accuracy"]
    assert broken["rounds"] == 60
    assert verify(tmp_path / "killed" / AUDIT_LOG).lines > 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dead_actor_stops_the_run_or_costs_its_clients_alone(tmp_path: Path) -> None:
    process = start(tmp_path, "actor", *LONG, "-c", "run.rounds=400")
    metrics = tmp_path / "actor" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    actors = [pid for pid in descendants(process.pid) if "ClientAppActor" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    if process.returncode:
        assert "limits.max-failure-share" in errors
        summary = finish(tmp_path, "actor", "--resume", *LONG, "-c", "run.rounds=400")
    else:
        summary = finish(tmp_path, "actor", "--resume", *LONG, "-c", "run.rounds=400")
        assert summary["failures"] > 0
    assert summary["rounds"] == 400


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", ["local", "finetune", "specialist", "fedsr", "fedadg"])
def test_kills_change_nothing_of_what_clients_keep(name: str, tmp_path: Path) -> None:
    """Neither the server's state nor what clients tell of their own models, which are made of what they kept."""
    settings = (*LONG, *OWN, "-c", f"strategy.name={name}", "-c", "fedsr.keep-momentum=true")
    unbroken = finish(tmp_path, "unbroken", *settings)
    kill_and_resume(tmp_path, 4, 24, *settings)
    broken = finish(tmp_path, "killed", "--resume", *settings)
    for result in ("weights_hash", "accuracy", "participants", "rounds"):
        assert broken[result] == unbroken[result]
    assert broken["participants"]["local"] > 0
