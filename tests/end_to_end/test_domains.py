"""Clients whose images look different: experts become those of domains, and beat one model for all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedjets_flwr.config.sections import Scalar
from tests.support.in_process import run_in_process

DOMAINS = ("as-is", "rotate-90", "negative", "rotate-180", "contrast")
SETTINGS: dict[str, Scalar] = {
    "partition__name": "domains", "partition__domains": ",".join(DOMAINS), "partition__labels_per_client": 10,
    "partition__public_share": 0.3, "partition__unseen_samples": 200, "common_expert__target_accuracy": 0.85,
    "run__rounds": 15, "run__evaluate_every": 15, "train__lr": 0.05, "moe__init": "common", "moe__top_k": 1,
    "transport__name": "inline",
}  # fmt: skip


@pytest.mark.timeout(120)
def test_experts_of_domains_beat_one_model_and_the_gate_finds_the_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summary(name: str) -> dict[str, Any]:
        settings = SETTINGS | {"strategy__name": name, "run__name": name}
        found = run_in_process(tmp_path, monkeypatch, **settings)
        told: dict[str, Any] = json.loads((found.config.run_dir / "summary.json").read_text())
        return told

    experts, one = summary("fedjets"), summary("fedavg")
    assert experts["kinds"] == list(DOMAINS)
    assert len(experts["classes"]) == 10
    assert experts["accuracy"] > one["accuracy"] + 0.1
    assert one["accuracy"] > experts["common_expert_accuracy"] + 0.1
    table = np.array(experts["expert_class_accuracy"])
    assert table.shape == (5, 5)
    assert (table.argmax(axis=0) == np.arange(5)).sum() >= 4  # expert m is the best on what its anchor holds
    assert experts["routing"]["sample_share"] >= 0.8
