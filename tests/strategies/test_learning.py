"""What the project is for: a gate that learns who needs which experts, on clients that it never saw."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fedjets_flwr.config.sections import Scalar
from tests.support.faults import Runner
from tests.support.in_process import InProcessGrid

SETTINGS: dict[str, Scalar] = {
    "run__rounds": 30, "run__evaluate_every": 30, "partition__clients": 20, "partition__unseen_clients": 4,
    "partition__samples_per_client": 60, "cohort__normals": 5, "moe__trainable": "head", "train__lr": 0.1,
    "common_expert__target_accuracy": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("learning"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


def test_a_learned_gate_beats_the_common_expert_and_a_random_one_and_comes_near_an_oracle(run: Runner) -> None:
    """Unseen clients hold four of ten labels, those of two anchors: they must receive exactly those two experts."""

    def summary(gate: str) -> dict[str, Any]:
        method = run(InProcessGrid, **SETTINGS, gate__mode=gate)
        found: dict[str, Any] = json.loads((method.config.run_dir / "summary.json").read_text())
        return found

    learned, random, oracle = (summary(gate) for gate in ("learned", "random", "oracle"))
    common = learned["common_expert_accuracy"]
    assert learned["accuracy"] > common + 0.1
    assert learned["routing"]["coverage"] == 1
    assert learned["routing"]["sample_share"] > 0.9
    assert random["accuracy"] < common
    assert random["accuracy"] < learned["accuracy"] - 0.3
    assert random["routing"]["sample_share"] < 0.5
    assert learned["accuracy"] <= oracle["accuracy"] < learned["accuracy"] + 0.1
    assert oracle["routing"]["sample_share"] == oracle["routing"]["coverage"] == 1
