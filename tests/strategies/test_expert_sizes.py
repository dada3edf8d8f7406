"""Experts may differ in architecture: each travels, trains, is averaged and answers in its own size."""

from pathlib import Path

import pytest
import torch

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.expert import expert_specs
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.seeds import derive
from strategies.fedjets import FedJets
from tests.support.faults import same_weights
from tests.support.runs import TinyRunner
from tests.support.tiny import EXPERTS

OF = [Architecture("cnn", 1 + m, "batch", "cifar", 1, 10) for m in range(EXPERTS)]
WHOLE: dict[str, Scalar] = {"moe__trainable": "all", "moe__init": "random", "run__inspect_every": 1}


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    monkeypatch.setattr(FedJets, "architecture", lambda self, expert: OF[expert])
    return TinyRunner(tmp_path, monkeypatch)


def test_each_expert_trains_in_its_own_size(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedjets", **WHOLE)
    sizes = [spec.size for spec in expert_specs(OF, "all")]
    assert sizes[0] < sizes[1] < sizes[2]
    records, moved = read_metrics(run.config.run_dir), set()
    for m, size in enumerate(sizes):
        start, end = (
            FlatModel(build(OF[m], derive(run.config.run.seed, "expert", m))).vector,
            run.vectors[f"expert.{m}"],
        )
        assert end.numel() == size
        assert bool(torch.isfinite(end).all())
        moved |= set() if torch.equal(start, end) else {f"expert.{m}"}
    assert {*moved, "gate"} == {name for record in records for name in record["trained"]}
    assert len(moved) > 1
    assert records[-1]["bytes_up"] == 4 * sum(
        run.vectors[name].numel() * count for name, count in records[-1]["trained"].items()
    )
    assert FlatModel(run.strategy.build(2)).vector.numel() == sizes[2]
    assert open_run(run.config.run_dir).serving.architectures == tuple(OF)


def test_transports_and_a_resumed_run_give_the_same_bits(tiny_run: TinyRunner) -> None:
    whole = tiny_run("fedjets", **WHOLE, train__schedule="constant")
    assert same_weights(whole, tiny_run("fedjets", **WHOLE, train__schedule="constant", transport__name="shared"))
    keep: dict[str, Scalar] = WHOLE | {"train__schedule": "constant", "run__name": "run"}
    tiny_run("fedjets", **keep, run__rounds=2)
    assert same_weights(whole, tiny_run("fedjets", **keep, run__resume=True))
