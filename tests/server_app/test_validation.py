"""Validation clients: they show the course of a run, and the unseen ones are scored once."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.report.page import write_report
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.score import VALIDATION_ACCURACY
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.in_process import Finished, run_in_process
from tests.support.tiny import tiny_method

SETTINGS: dict[str, Scalar] = {
    "transport__name": "inline", "partition__public_share": 0.3, "partition__validation_clients": 2,
    "partition__unseen_samples": 40, "run__rounds": 3, "run__evaluate_every": 1, "run__inspect_every": 1,
}  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    return run_in_process(tmp_path, monkeypatch, **SETTINGS)


def test_rounds_score_the_validation_clients_and_the_last_one_the_unseen_too(finished: Finished) -> None:
    config = finished.config
    first = config.partition.clients + config.partition.unseen_clients
    records = read_metrics(config.run_dir)
    assert ["evaluation" in record for record in records] == [False, False, True]
    for record in records:
        assert list(record["validation"]["per_client_accuracy"]) == [str(first), str(first + 1)]
        assert record["score"]["name"] == "accuracy on validation clients"
        assert record["score"]["value"] == record["validation"]["accuracy"]
    unseen = [str(client) for client in range(config.partition.clients, first)]
    assert list(records[-1]["evaluation"]["per_client_accuracy"]) == unseen


def test_where_none_is_here_the_unseen_ones_still_choose_nothing() -> None:
    """They may be late, or hold no labels."""
    method = tiny_method("fedavg", partition__validation_clients=2, partition__public_share=0.3)
    scoring, clients = method.rounds.scoring, method.rounds.clients
    clients.validation, clients.unseen = [], [7, 8]
    assert scoring.scored(last=False) == []
    assert scoring.scored(last=True) == [7, 8]
    assert scoring.score is VALIDATION_ACCURACY


def test_no_weight_depends_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a split that keeps no combination out of training for them."""
    hashes = [
        json.loads((run.config.run_dir / "summary.json").read_text())["weights_hash"]
        for count in (0, 2)
        for run in [
            run_in_process(
                tmp_path, monkeypatch,
                **SETTINGS | {"partition__name": "dirichlet", "partition__alpha": 1.0, "run__name": f"run{count}",
                              "partition__validation_clients": count},
            )
        ]
    ]  # fmt: skip
    assert hashes[0] == hashes[1]


def test_the_summary_and_the_pictures_tell_both(finished: Finished) -> None:
    folder = finished.config.run_dir
    summary, records = json.loads((folder / "summary.json").read_text()), read_metrics(folder)
    told = summary["validation"]
    assert told["accuracy"] == records[-1]["validation"]["accuracy"]
    assert told["best_accuracy"] == max(record["validation"]["accuracy"] for record in records)
    assert summary["score"]["best"] == told["best_accuracy"]
    assert summary["accuracy"] == records[-1]["evaluation"]["accuracy"]
    assert summary["validation_controls"].keys() == summary["controls"].keys()
    assert summary["validation_controls"] != summary["controls"]
    assert {path.stem for path in draw_plots(folder)} == {"accuracy", "experts", "load", "clients"}
    page = write_report(folder).read_text()
    assert "Accuracy on validation clients" in page
    assert f"validation clients</dt><dd>{100 * told['accuracy']:.1f}" in page


def test_the_best_checkpoint_is_theirs(finished: Finished) -> None:
    folder = finished.config.run_dir
    accuracies = [record["validation"]["accuracy"] for record in read_metrics(folder)]
    with safe_open(folder / "checkpoints" / "best.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["round"] == 1 + accuracies.index(max(accuracies))
    assert facts["best"] == max(accuracies)
