"""Whole runs through the real Flower engine, as a user starts them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedjets_flwr.moe.controls import measured
from tests.support.started import finish, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end")


@pytest.fixture(scope="module")
def two_nodes(folder: Path) -> dict[str, Any]:
    return finish(folder, "two", "--supernodes", "2")


def test_a_run_leaves_everything_the_design_names(folder: Path, two_nodes: dict[str, Any]) -> None:
    assert two_nodes["status"] == "completed"
    assert two_nodes["rounds"] == 2
    assert two_nodes["embeddings_computed"] == 10
    assert set(two_nodes["controls"]) == set(measured(1.0, [{0}]))
    assert set(two_nodes["per_client_accuracy"]) == {"8", "9"}
    assert 0 <= two_nodes["accuracy"] <= two_nodes["best_accuracy"] <= 1
    assert sum(two_nodes["routing"]["expert_load"]) == pytest.approx(1)
    assert two_nodes["bytes_down"] >= two_nodes["bytes_up"] > 0
    run = folder / "two"
    assert {path.name for path in (run / "plots").iterdir()} == {
        "accuracy.png", "clients.png", "experts.png", "load.png"
    }  # fmt: skip
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    assert records[0]["failures"] == {}
    assert sorted(records[0]["cohort"])[:5] == [0, 1, 2, 3, 4]
    assert "round 2/2" in (run / "run.log").read_text()
    assert any((run / "checkpoints").glob("round-000002-*.safetensors"))


@pytest.mark.slow
def test_the_number_of_nodes_changes_no_bit_and_nothing_is_embedded_twice(
    folder: Path, two_nodes: dict[str, Any]
) -> None:
    five = finish(folder, "five", "--supernodes", "5")
    assert five["weights_hash"] == two_nodes["weights_hash"]
    assert five["accuracy"] == two_nodes["accuracy"]
    assert (five["bytes_down"], five["bytes_up"]) == (two_nodes["bytes_down"], two_nodes["bytes_up"])
    assert five["embeddings_computed"] == 0


def test_a_run_that_fails_inside_flower_exits_with_its_reason(folder: Path, two_nodes: dict[str, Any]) -> None:
    process = start(folder, "late", "-c", "limits.exchange-seconds=0.01", "-c", "limits.node-seconds=2")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert "limits." in errors
