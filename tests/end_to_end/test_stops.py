"""Whole runs through the real Flower that are stopped or lose their launcher: what lives, what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedjets_flwr.config.sources import parse_pairs
from fedjets_flwr.cpus import cpu_count
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.launch.superlink import to_toml
from fedjets_flwr.runs.run_folder import Recorded, read_recorded
from tests.support.deployed import ONE_EACH, QUICK
from tests.support.in_process import run_in_process
from tests.support.processes import descendants, heed_signals, wait_until_gone
from tests.support.started import TINY, finish, start

ENDLESS = ("-c", "run.rounds=100000", "-c", "run.evaluate-every=100000", "-c", "run.checkpoint-every=100000")
DOCKER = 10.0
"""Seconds from SIGTERM to SIGKILL of ``docker stop``; a test's machine may be busy."""


def wait_for_rounds(process: "subprocess.Popen[str]", folder: Path, rounds: int) -> None:
    """Return when a run has recorded so many rounds."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and metrics.read_text().count("\n") >= rounds):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Send a signal to a launcher; nothing of its run lives when it ends."""
    family = descendants(process.pid)
    assert len(family) > 3
    process.send_signal(number)
    process.communicate(timeout=6 * DOCKER)
    assert process.returncode == 128 + number
    wait_until_gone(family, seconds=0)


def check_stopped(folder: Path) -> Recorded:
    """Return what a stopped run recorded, whose newest checkpoint is of its last round."""
    recorded = read_recorded(folder)
    assert recorded.status == "stopped"
    newest = max(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("round-*.safetensors"))
    assert newest == len(recorded.records) >= 1
    assert not (folder / ".stop").exists()
    return recorded


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_leaves_no_process_and_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    process = start(tmp_path, "stopped", *ENDLESS)
    wait_for_rounds(process, tmp_path / "stopped", 2)
    interrupt(process, number)
    rounds = len(check_stopped(tmp_path / "stopped").records) + 1
    resumed = finish(tmp_path, "stopped", "--resume", *ENDLESS, "-c", f"run.rounds={rounds}")
    assert resumed["rounds"] == rounds
    assert resumed["weights_hash"] == unbroken(tmp_path, monkeypatch, rounds)


def unbroken(folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> str:
    """Return the hash of the weights after so many rounds, done in this process."""
    own = parse_pairs([*TINY, f"run.rounds={rounds}", f"run.evaluate-every={rounds}", "run.name=unbroken"])
    changes = {key.replace(".", "__").replace("-", "_"): value for key, value in own.items()}
    return weights_hash(run_in_process(folder, monkeypatch, **changes).vectors)


@pytest.mark.slow
def test_what_a_run_was_to_replace_is_back_when_it_stops_before_its_rounds(tmp_path: Path) -> None:
    """The ServerApp looks for a stop between rounds, and the common expert may take minutes."""
    before = finish(tmp_path, "replaced")
    endless = ("common-expert.max-epochs=100000", "common-expert.target-accuracy=1", "common-expert.seed=7")
    process = start(tmp_path, "replaced", "--overwrite", *(word for pair in endless for word in ("-c", pair)))
    hidden, deadline = tmp_path / "replaced" / ".before" / "summary.json", time.monotonic() + 120
    progress = tmp_path / "replaced" / "progress.json"
    while not (hidden.is_file() and progress.is_file() and "common expert" in progress.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    family = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "what it was to replace is back" in output
    assert not (tmp_path / "replaced" / ".before").exists()
    recorded = read_recorded(tmp_path / "replaced")
    assert (recorded.status, recorded.results) == ("completed", before)
    wait_until_gone(family, seconds=5)


@pytest.mark.slow
@pytest.mark.parametrize("guards", [False, True], ids=["launcher", "launcher and guards"])
def test_nothing_outlives_a_killed_launcher_by_half_a_minute(tmp_path: Path, guards: bool) -> None:
    process = start(tmp_path, "killed", *ENDLESS)
    wait_for_rounds(process, tmp_path / "killed", 2)
    family = descendants(process.pid)
    process.kill()
    for pid in family:
        if guards and "guard.py" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    wait_until_gone(family, seconds=30)
    rounds = len(check_stopped(tmp_path / "killed").records)  # the ServerApp lost its parent, and had time for that
    resumed = finish(tmp_path, "killed", "--resume", *ENDLESS, "-c", f"run.rounds={rounds + 1}")
    assert resumed["rounds"] == rounds + 1


def two_rows(folder: Path, **rounds: int) -> list[str]:
    """Return the command of a comparison of two rows."""
    settings = parse_pairs([*TINY, f"run.cache-dir={folder / 'cache'}"])
    (folder / "folder").mkdir()
    (folder / "preset.toml").write_text(to_toml(settings))
    rows = [{"name": k, "settings": {"run.rounds": n, "run.evaluate-every": n}} for k, n in rounds.items()]
    experiment = {"title": "two", "preset": "preset.toml", "seeds": [1], "rows": rows}
    (folder / "folder" / "two.yaml").write_text(json.dumps(experiment))
    return ["compare", "folder/two.yaml", "--output-dir", "runs", "--output", "results"]


@pytest.mark.slow
@pytest.mark.skipif(cpu_count() < 2, reason="a client's process for each of two runs needs a CPU")
def test_all_runs_of_a_stopped_comparison_keep_their_last_round(tmp_path: Path) -> None:
    process = fedjets(tmp_path, *two_rows(tmp_path, one=100000, other=100001), "--parallel", "2")
    while len(folders := list(tmp_path.glob("runs/*/config.json"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    for path in folders:
        wait_for_rounds(process, path.parent, 2)
    interrupt(process, signal.SIGTERM)
    for path in folders:
        check_stopped(path.parent)


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    command = two_rows(tmp_path, short=2, long=200)
    process = fedjets(tmp_path, *command)
    while not (found := [f for f in tmp_path.glob("runs/*") if _rounds(f) == 200]):
        time.sleep(0.2)
    wait_for_rounds(process, found[0], 2)
    interrupt(process, signal.SIGTERM)
    kept = check_stopped(found[0]).records
    assert len(kept) < 200
    process = fedjets(tmp_path, *command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert "run 1 of 2" not in output and "run 2 of 2" in output
    assert read_recorded(found[0]).records[: len(kept)] == kept
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| short | 1 |" in table and "| long | 1 |" in table and "failed" not in table


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rehearsed_deployment_ends_as_a_whole(tmp_path: Path, number: signal.Signals) -> None:
    settings = QUICK | ONE_EACH | {"run.rounds": 50, "run.cache-dir": str(tmp_path / "cache")}
    (tmp_path / "preset.toml").write_text(to_toml(settings))
    options = ["--sites", "2", "--unseen", "1", "--config", "preset.toml", "--output-dir", "runs"]
    process = fedjets(tmp_path, "deploy-local", *options)
    folder = tmp_path / "runs" / str(settings["run.name"])
    wait_for_rounds(process, folder, 1)
    if number == signal.SIGTERM:
        interrupt(process, number)
        check_stopped(folder)
        assert {path.name for path in (folder / "logs").iterdir()} >= {"superlink.log", "site0.log"}
        return
    family = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(family, seconds=30)


def fedjets(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, preexec_fn=heed_signals,
    )  # fmt: skip


def _rounds(folder: Path) -> int:
    config = folder / "config.json"
    return int(json.loads(config.read_text())["run.rounds"]) if config.is_file() else 0
