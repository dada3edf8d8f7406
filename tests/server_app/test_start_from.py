"""Runs that start from the models of another, and those that only score them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.in_process import Finished
from tests.support.runs import TinyRunner
from tests.support.tiny import tiny


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    return TinyRunner(tmp_path, monkeypatch)


def summary(run: Finished) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run.config.run_dir / "summary.json").read_text())
    return told


def on_from(run: Finished, **more: Scalar) -> dict[str, Scalar]:
    return {"run__start_from": str(run.config.run_dir), "common_expert__path": "", **more}


@pytest.mark.parametrize("name", ["fedjets", "fedavg", "ifca", "ensembles"])
def test_no_rounds_only_score_the_models_of_another_run(tiny_run: TinyRunner, name: str) -> None:
    whole = tiny_run(name)
    again = tiny_run(name, **on_from(whole, run__rounds=0))
    (record,) = read_metrics(again.config.run_dir)
    assert (record["round"], record["cohort"], record["loss"], record["trained"]) == (0, [], None, {})
    assert (record["bytes_up"], record["failures"]) == (0, {})
    told, wanted = summary(again), summary(whole)
    assert (told["status"], told["rounds"]) == ("completed", 0)
    same = (
        "weights_hash",
        "accuracy",
        "readings",
        "per_client_accuracy",
        "chosen",
        "controls",
        "expert_class_accuracy",
    )
    assert {key: told[key] for key in same} == {key: wanted[key] for key in same}


def test_other_unseen_clients_are_scored_with_the_same_models(tiny_run: TinyRunner) -> None:
    whole = tiny_run("fedjets")
    more = tiny_run("fedjets", **on_from(whole, run__rounds=0, partition__unseen_clients=3))
    assert summary(more)["weights_hash"] == summary(whole)["weights_hash"]
    assert set(summary(more)["per_client_accuracy"]) == {"7", "8", "9"}
    assert more.num_samples[7] != whole.num_samples[7]


def test_a_run_goes_on_from_the_models_of_another_and_has_rounds_of_its_own(tiny_run: TinyRunner) -> None:
    """Round 1 is that of a run whose state begins so; what only the new method has starts by itself."""
    one, own = tiny_run("fedavg"), tiny_run("fedjets", run__rounds=1)
    start = summary(tiny_run("fedjets", **on_from(one, run__rounds=0)))
    assert start["weights_hash"] == weights_hash(
        {f"expert.{m}": one.vectors["expert.0"] for m in range(3)} | {"gate": own.strategy.state()["gate"]}
    )
    on = tiny_run("fedjets", **on_from(one, run__rounds=2))
    assert [record["round"] for record in read_metrics(on.config.run_dir)] == [1, 2]
    assert not torch.equal(on.vectors["expert.0"], one.vectors["expert.0"])
    assert not torch.equal(on.vectors["expert.0"], tiny_run("fedjets", run__rounds=2).vectors["expert.0"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moe__experts": 4}, "run.start-from = .*: it has no expert.3; lower moe.experts"),
        ({"gate__hidden": 9}, "run.start-from = .*: its gate is of another size"),
        ({"run__start_from": "/nowhere"}, "run.start-from = '/nowhere': no finished run; name the folder of one"),
    ],
)
def test_what_does_not_fit_is_named(tiny_run: TinyRunner, changes: dict[str, Scalar], reason: str) -> None:
    whole = tiny_run("fedjets", run__rounds=1)
    with pytest.raises(FedjetsError, match=reason):
        tiny_run("fedjets", **on_from(whole) | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run__rounds": 0}, "run.rounds = 0: there is nothing to score without run.start-from"),
        (
            {"run__start_from": "a", "common_expert__path": "b"},
            "common-expert.path = 'b': run.start-from brings its own",
        ),
        (
            {"run__start_from": "a", "privacy__noise_multiplier": 1.0},
            "run.start-from: the models that it names were trained without this run's noise",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_told(changes: dict[str, Scalar], reason: str) -> None:
    with pytest.raises(FedjetsError, match=reason):
        tiny(**changes)


def test_the_variates_of_another_run_are_not_taken_over(tiny_run: TinyRunner) -> None:
    """Its clients' own ones stay there, and c is their mean."""
    whole = tiny_run("scaffold")
    assert float(whole.vectors["variate"].abs().sum()) > 0
    on = tiny_run("scaffold", **on_from(whole, run__rounds=0))
    assert torch.equal(on.vectors["expert.0"], whole.vectors["expert.0"])
    assert not on.vectors["variate"].any()


def test_a_resumed_run_of_no_rounds_has_one_record(tiny_run: TinyRunner) -> None:
    own = on_from(tiny_run("fedjets"), run__rounds=0, run__name="scored")
    first = summary(tiny_run("fedjets", **own))
    again = tiny_run("fedjets", **own, run__resume=True)
    assert [record["round"] for record in read_metrics(again.config.run_dir)] == [0]
    assert {k: summary(again)[k] for k in ("accuracy", "bytes_down", "weights_hash")} == {
        k: first[k] for k in ("accuracy", "bytes_down", "weights_hash")
    }
