"""Comparisons: each shipped experiment is sound; a small one runs, goes on where it was cut off, and runs once."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fedjets_flwr.compare.experiment
from fedjets_flwr.compare.experiment import markdown, read_experiment, run_experiment
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.simulation import Resources
from strategies import validate
from tests.end_to_end.test_simulation import TINY

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))

SMALL = """
title: small
preset: digits
seeds: [1]
rows:
  - {name: FedAvg, settings: {strategy.name: fedavg}}
  - {name: FedJETs, readings: [blend/em]}
"""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_is_sound(path: Path) -> None:
    experiment = read_experiment(path, [], None)
    assert experiment.title
    assert all(configs for _, configs in experiment.rows)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("title: [", "experiment.yaml"),
        (SMALL.replace("seeds: [1]", "seeds: []"), "seeds"),
        (SMALL.replace("strategy.name: fedavg", "strategy.nme: fedavg"), "row 'FedAvg'"),
        (SMALL.replace("preset: digits", "preset: configs/nope.toml"), "nope.toml"),
        (SMALL.replace("readings:", "reading:"), "rows"),
        (SMALL.replace("blend/em", "blend/magic"), "blend/magic"),
    ],
)
def test_a_wrong_experiment_is_one_clear_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.toml").write_text("")
    path = tmp_path / "experiments" / "experiment.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FedjetsError, match=word) as caught:
        read_experiment(path, [], None)
    assert "\n" not in str(caught.value)


def compare(folder: Path) -> str:
    pairs = [*TINY, f"run.cache-dir={folder / 'cache'}"]
    options = [part for pair in pairs for part in ("-c", pair)]
    command = [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", "compare"]
    done = subprocess.run(
        [*command, str(folder / "experiments" / "small.yaml"), *options], cwd=folder, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(folder: Path, text: str = SMALL) -> Path:
    path = folder / "experiments" / "small.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return path


def test_a_comparison_runs_each_row_once(tmp_path: Path) -> None:
    small(tmp_path)
    assert compare(tmp_path).count("round 2/2") == 2
    results = tmp_path / "results" / "small"
    table = (results / "table.md").read_text()
    for row in ("| common expert |", "| common expert + EM (control) |", "| FedAvg |", "| FedJETs |", "blend/em"):
        assert row in table
    assert {path.name for path in results.glob("*.png")} == {"accuracy.png", "bytes.png"}
    assert "round" not in compare(tmp_path).split("|")[0]
    assert (results / "table.md").read_text() == table


def test_a_failed_run_is_named_in_the_table(tmp_path: Path) -> None:
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")
    _, (config,) = experiment.rows[0]
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "error.json").write_text('{"reason": "round 3: 6 of 10 clients failed"}')
    table = markdown(experiment)
    assert "| FedAvg | 1 | failed |" in table
    assert "FedAvg: round 3: 6 of 10 clients failed" in table
    assert "| FedJETs |" not in table


def test_every_row_is_checked_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the second row are sound one by one; what is wrong shows in its data."""
    text = SMALL.replace("readings:", "settings: {partition.unseen-clients: 5000}, readings:")
    experiment = read_experiment(small(tmp_path, text), [], tmp_path / "runs")
    monkeypatch.setattr(fedjets_flwr.compare.experiment, "run_and_follow", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(FedjetsError, match="row 'FedJETs': partition.unseen-clients"):
        run_experiment(experiment, tmp_path / "results", Resources(), Console(), validate)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "results").exists()


def test_a_run_that_dies_before_it_can_say_why_is_failed_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")

    def die(*_: object) -> None:
        raise FedjetsError("Flower's SuperLink did not start")

    monkeypatch.setattr(fedjets_flwr.compare.experiment, "run_and_follow", die)
    with pytest.raises(FedjetsError, match="2 of 2 runs failed"):
        run_experiment(experiment, tmp_path / "results", Resources(), Console(), validate)
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| FedAvg | 1 | failed |" in table
    assert "FedJETs: Flower's SuperLink did not start" in table
