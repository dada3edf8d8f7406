"""FedMoE on a small text through the real engine: the same bits on any number of nodes, and after a kill."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from fedjets_flwr.runs.checkpoint import checkpoint_files
from fedjets_flwr.runs.claim import CHECKPOINTS
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.processes import kill
from tests.support.started import finish, start

FEDMOE = (
    "--preset", "fedmoe", "-c", "moe.trainable=all", "-c", "partition.clients=4", "-c", "cohort.normals=3",
    "-c", "language-model.pretrain-steps=20", "-c", "fedmoe.memory=1,0.6,0.75", "-c", "fedmoe.patience=1",
    "-c", "train.lr=0.03", "-c", "run.rounds=8", "-c", "run.checkpoint-every=2",
)  # fmt: skip
"""So large a rate that scores often stand still and clients get other experts."""

SAME = ("weights_hash", "experts_held", "activation", "domain_of", "memory", "participants", "score", "rounds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def two_nodes(folder: Path) -> dict[str, Any]:
    return finish(folder, "two", *FEDMOE, "--supernodes", "2")


def notes(run: Path) -> Any:
    """What the last checkpoint knows of every client's experts."""
    (_, newest), *_ = checkpoint_files(run / CHECKPOINTS)
    with safe_open(newest, "pt") as file:
        return json.loads(file.metadata()["facts"])["method"]


def held(run: Path) -> list[float]:
    return [record["metrics"]["experts_mean"] for record in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [1, 8])
def test_the_number_of_nodes_changes_no_bit_and_no_structure(
    nodes: int, folder: Path, two_nodes: dict[str, Any]
) -> None:
    other = finish(folder, f"nodes-{nodes}", *FEDMOE, "--supernodes", str(nodes))
    assert {name: other[name] for name in SAME} == {name: two_nodes[name] for name in SAME}
    assert notes(folder / f"nodes-{nodes}") == notes(folder / "two")
    assert held(folder / f"nodes-{nodes}") == held(folder / "two")
    assert len(set(held(folder / "two"))) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_to_the_same_weights_and_structures(folder: Path, two_nodes: dict[str, Any]) -> None:
    process = start(folder, "killed", *FEDMOE, "--supernodes", "2")
    deadline = time.monotonic() + 240
    while len(read_metrics(folder / "killed")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    kill(process)
    assert not (folder / "killed" / "summary.json").exists()
    resumed = finish(folder, "killed", *FEDMOE, "--supernodes", "2", "--resume")
    assert {name: resumed[name] for name in SAME} == {name: two_nodes[name] for name in SAME}
    assert notes(folder / "killed") == notes(folder / "two")
    assert held(folder / "killed") == held(folder / "two")
