"""The lines of a table, by hand, of two runs that are written as a run writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedjets_flwr.compare.experiment import Experiment, Row
from fedjets_flwr.compare.lines import Line, lines_of
from fedjets_flwr.compare.table import markdown
from fedjets_flwr.config.schema import Config

CONTROLS = [
    {"common_expert": 0.50, "common_expert_em": 0.54, "common_expert_support": 0.56, "common_expert_masked": 0.70},
    {"common_expert": 0.60, "common_expert_em": 0.70, "common_expert_support": 0.58, "common_expert_masked": 0.80},
]
"""By seed. The best that reads no label is EM by the mean over seeds, though not in the first of them."""

COURSES = [
    {"top-1/none": [0.40, 0.66, 0.60], "top-1/masked": [0.90, 0.90, 0.80], "blend/em": [0.61, 0.50, 0.52],
     "blend/masked": [0.95, 0.95, 0.85]},
    {"top-1/none": [0.50, 0.76, 0.74], "top-1/masked": [0.97, 0.97, 0.90], "blend/em": [0.67, 0.60, 0.66],
     "blend/masked": [0.99, 0.99, 0.95]},
]  # fmt: skip
"""By seed: each read-out after three evaluations, of which the last is not the best."""

COSTS: list[dict[str, Any]] = [
    {"client_rounds": 40, "bytes_down": 1_200_000, "bytes_up": 400_000, "bytes_served": 80_000, "seconds": 30.0},
    {"client_rounds": 60, "bytes_down": 600_000, "bytes_up": 1_200_000, "bytes_served": 360_000, "seconds": 40.0},
]
"""By seed. Down 30 and 10 kB per client and round, up 10 and 20, served 2 and 6."""


def write_run(folder: Path, seed: int) -> None:
    """Write what a finished run leaves: an evaluation in every other one of six rounds."""
    folder.mkdir(parents=True)
    at = [
        {
            "reading": "top-1/none",
            "accuracy": accuracy,
            "readings": {n: course[i] for n, course in COURSES[seed].items()},
        }
        for i, accuracy in enumerate(COURSES[seed]["top-1/none"])
    ]
    records = [{"round": r} | ({"evaluation": at[r // 2 - 1]} if r % 2 == 0 else {}) for r in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "status": "completed", "strategy": "fedjets", "seed": seed, **at[-1], "controls": CONTROLS[seed],
        "trained_parameters": 1_234_567, "flops_per_answer": 2_500_000, **COSTS[seed],
        "seconds": {"round": COSTS[seed]["seconds"], "training": 5.0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A row of two seeds, and of one read-out more."""
    configs = [
        Config.from_flat({"run.output-dir": str(tmp_path), "run.name": f"run{seed}", "run.seed": seed})
        for seed in (0, 1)
    ]
    for seed, config in enumerate(configs):
        write_run(config.run_dir, seed)
    return Experiment("by hand", tmp_path, ((Row(name="FedJETs", readings=["blend/em"]), tuple(configs)),))


def columns(line: Line) -> dict[str, Any]:
    names = ("last", "best", "masked", "over_common", "over_free")
    return {name: pytest.approx(getattr(line, name)) for name in names}


def test_a_line_of_a_row_is_what_its_runs_reached(experiment: Experiment) -> None:
    """Over the common expert, and over the best that reads no label, of the same seed: more is positive."""
    lines = {line.name: line for line in lines_of(experiment)}
    assert columns(lines["FedJETs"]) == {
        "last": [0.60, 0.74],
        "best": [0.66, 0.76],
        "masked": [0.80, 0.90],
        "over_common": [0.10, 0.14],
        "over_free": [0.06, 0.04],
    }
    assert columns(lines["FedJETs, blend/em"]) == {
        "last": [0.52, 0.66],
        "best": [0.61, 0.67],
        "masked": [0.85, 0.95],
        "over_common": [0.02, 0.06],
        "over_free": [-0.02, -0.04],
    }


def test_a_line_of_a_control_is_held_against_the_common_expert_and_the_best_control(experiment: Experiment) -> None:
    """They have no course, so that the best is the last."""
    lines = {line.name: line for line in lines_of(experiment)}
    assert list(lines)[:3] == ["common expert", "common expert + EM", "common expert + EM's support"]
    assert columns(lines["common expert"]) == {
        "last": [0.50, 0.60],
        "best": [0.50, 0.60],
        "masked": [0.70, 0.80],
        "over_common": [0.0, 0.0],
        "over_free": [-0.04, -0.10],
    }
    assert columns(lines["common expert + EM's support"]) == {
        "last": [0.56, 0.58],
        "best": [0.56, 0.58],
        "masked": [0.70, 0.80],
        "over_common": [0.06, -0.02],
        "over_free": [0.02, -0.12],
    }


def test_what_a_row_costs_is_by_client_and_round_and_the_mean_over_seeds(experiment: Experiment) -> None:
    """Runs whose rounds had other numbers of clients count alike."""
    line = next(line for line in lines_of(experiment) if line.name == "FedJETs")
    assert line.facts == {
        "down": 20_000, "up": 15_000, "served": 4_000, "seconds": 35, "parameters": 1_234_567, "flops": 2_500_000,
        "epsilon": 0,
    }  # fmt: skip


def test_the_table_shows_percent_over_seeds_and_the_sign_of_a_gain(experiment: Experiment) -> None:
    """Mean ± standard deviation, each under its own heading."""
    table = markdown(experiment).splitlines()
    head = (
        "| method | seeds | last | best | classes known | over common | over best free | kB down | kB up | s"
        " | parameters | MFLOPs |"
    )
    place = table.index(head)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table[place + 2 :] if line.startswith("|")}
    assert rows["FedJETs"] == (
        "| FedJETs | 2 | 67.00 ± 9.90 | 71.00 ± 7.07 | 85.00 ± 7.07 | +12.00 ± 2.83 | +5.00 ± 1.41"
        " | 20.0 | 15.0 | 35 | 1,234,567 | 2.5 |"
    )
    assert rows["FedJETs, blend/em"] == (
        "| FedJETs, blend/em | 2 | 59.00 ± 9.90 | 64.00 ± 4.24 | 90.00 ± 7.07 | +4.00 ± 2.83 | -3.00 ± 1.41"
        " | 20.0 | 15.0 | 35 | 1,234,567 | 2.5 |"
    )
    assert rows["common expert + EM"] == (
        "| common expert + EM | 2 | 62.00 ± 11.31 | 62.00 ± 11.31 | 75.00 ± 7.07 | +7.00 ± 4.24 | +0.00 ± 0.00"
        " |  |  |  |  |  |"
    )
