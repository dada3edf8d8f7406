"""A run that ends when its clients find the shared model no better, with the best one."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_app.algorithms import fedavg
from client_app.client import Update
from client_app.validation import looking
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.moe.early_stopping import looks, mean_loss
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies import validate
from strategies.fedavg import FedAvg
from tests.support.faults import same, same_weights
from tests.support.runs import TinyRunner, tiny_run
from tests.support.tiny import context_of, start_vectors, tiny, tiny_runtime

__all__ = ["tiny_run"]

PARTS: dict[str, Scalar] = {
    "partition__val_share": 0.25, "partition__test_share": 0.25, "partition__samples_per_client": 40,
    "train__schedule": "constant",
}  # fmt: skip
CONSENT: dict[str, Scalar] = {
    "partition__private_share": 0.4, "partition__name": "majority", "common_expert__max_epochs": 0,
}  # fmt: skip
EVERY: dict[str, Scalar] = {"early_stopping__check_every": 1}


# When, and which model is kept ----------------------------------------------------------------------------------------


def test_what_rounds_1_and_41_and_81_left_is_looked_at() -> None:
    rule = Config.from_flat({"early-stopping.check-every": 40}).early_stopping
    assert [r for r in range(1, 130) if looks(rule, r)] == [2, 42, 82, 122]
    assert not any(looks(Config().early_stopping, r) for r in range(200))


class Told(FedAvg):
    """FedAvg whose state and clients are given."""

    def __init__(self, config: Config) -> None:
        self.config, self.vectors = config, {"expert.0": torch.tensor([0.0])}
        self.weights = {0: 1.0, 1: 3.0}


def reply(client: int, **numbers: float) -> Reply:
    return Reply(client, {}, numbers)


@given(losses=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=12), patience=st.integers(1, 4))
def test_the_model_of_the_lowest_loss_is_kept_and_patience_ends_the_run(losses: list[float], patience: int) -> None:
    config = Config.from_flat(
        {"strategy.name": "fedavg", "early-stopping.check-every": 1, "early-stopping.patience": patience}
        | {"partition.val-share": 0.2, "run.rounds": len(losses) + 1}
    )
    method, done = Told(config), 0
    for number, loss in enumerate([math.nan, *losses], start=1):
        kept = {} if number == 1 else dict(method.kept(number, reply(0, **{"validation-loss": loss})))
        method.merge({"expert.0": torch.tensor([float(number)])}, kept)
        method.after_merge(number)
        done = number
        if method.done:
            break
    seen = losses[: done - 1]
    best = min(range(len(seen)), key=seen.__getitem__)  # the first of equal ones
    assert method.vectors["expert.0"].item() == best + 1  # what that many rounds made of zero
    late = len(seen) - 1 - best
    assert method.done == (late >= patience)
    assert method.done or done == len(losses) + 1


def test_losses_count_by_the_clients_weights_and_an_absurd_one_little() -> None:
    config = Config.from_flat({"strategy.name": "fedavg", "early-stopping.check-every": 1, "partition.val-share": 0.2})

    def mean(*told: float) -> float:
        method, kept = Told(config), dict[str, torch.Tensor]()
        for client, loss in enumerate(told):
            kept |= method.kept(2, reply(client, **{"validation-loss": loss}))
        method.merge({}, kept)
        return method.after_merge(2)["lowest-validation-loss"]

    assert mean(1.0, 2.0) == pytest.approx((1.0 + 3 * 2.0) / 4)
    assert mean(1.0, 1e30) == pytest.approx((1.0 + 3 * 1e30) / 4)  # of two nobody is the odd one
    assert Told(config).kept(1, reply(0, **{"validation-loss": 1.0})) == {}  # not a round that looks
    assert Told(config).kept(2, reply(0)) == {}


def test_under_a_robust_rule_one_client_does_not_choose_the_model() -> None:
    """Four of five see the model become better; the fifth says anything that is a loss."""
    flat = {"strategy.name": "fedavg", "early-stopping.check-every": 1, "partition.val-share": 0.2}
    for lie in (0.0, 1e30):
        method = Told(Config.from_flat(flat | {"aggregation.rule": "median", "early-stopping.patience": 1}))
        method.weights = dict.fromkeys(range(5), 1.0)
        for number in range(2, 6):
            honest = dict.fromkeys(range(4), 2 / number)
            kept = dict[str, torch.Tensor]()
            for client, loss in (honest | {4: lie if number == 2 else 2 / number}).items():
                kept |= method.kept(number, reply(client, **{"validation-loss": loss}))
            method.merge({"expert.0": torch.tensor([float(number)])}, kept)
        assert not method.done
        assert method.vectors["best"].item() == 4.0


def test_a_loss_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.from_flat({"strategy.name": "fedavg", "early-stopping.check-every": 1, "partition.val-share": 0.2})
    monkeypatch.setattr("strategies.base.check_trained", lambda *_: None)
    method = Told(config)
    method.num_samples = {0: 4}
    monkeypatch.setattr(Told, "variances", {})
    method.check(reply(0, **{"validation-loss": 1.5}))
    method.check(reply(0))
    for bad in (math.nan, math.inf, "low", -1e300, -1.0):
        with pytest.raises(BadReply, match="validation-loss"):
            method.check(replace(reply(0), numbers={"validation-loss": bad}))  # type: ignore[dict-item]


# The client's side ----------------------------------------------------------------------------------------------------


def test_a_client_tells_the_loss_of_what_it_received_on_what_it_shares(tmp_path: Path) -> None:
    changes = {**PARTS, **EVERY, **CONSENT}
    runtime, vectors = tiny_runtime(tmp_path, strategy__name="fedavg", **changes), start_vectors("expert.0")
    context = context_of(runtime, Job(2, ("expert.0",)), 2)
    context = replace(context, data=runtime.data(2, "shared"))
    held, sent = context.on("shared-val"), vectors["expert.0"].clone()
    assert 0 < len(held.data) < len(context.on("val").data)
    wanted = mean_loss(context.copy(0, sent), held.plain_inputs(), held.data.targets, context.task.total_loss)
    plain, told = fedavg.train(context, vectors), looking(fedavg.train)(context, vectors)
    assert told.numbers["validation-loss"] == pytest.approx(wanted, rel=1e-6)
    assert same(told.vectors["expert.0"], plain.vectors["expert.0"])
    assert "validation-loss" not in looking(fedavg.train)(replace(context, server_round=1), vectors).numbers
    ruined: Update = looking(fedavg.train)(context, {"expert.0": torch.full_like(sent, math.nan)})
    assert "validation-loss" not in ruined.numbers


def test_what_a_client_shares_of_its_parts_is_of_them() -> None:
    config = tiny(**CONSENT, **PARTS)
    for shared, part in (("shared", "train"), ("shared-val", "val")):
        whole, some = (open_client(config, 1, None, p).images.pixels for p in (part, shared))
        assert len(some) == len(whole) - round(0.4 * len(whole))
        assert all(any(torch.equal(one, other) for other in whole) for one in some)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.runs
def test_looking_changes_no_weight_and_the_best_is_kept(tiny_run: TinyRunner) -> None:
    watched = tiny_run("fedavg", run__rounds=4, early_stopping__check_every=2, **PARTS)
    records = read_metrics(watched.config.run_dir)
    looks_at = [tiny_run("fedavg", run__rounds=rounds, **PARTS).vectors["expert.0"] for rounds in (1, 3)]
    lowest = [record.get("metrics", {}).get("lowest-validation-loss") for record in records]
    assert lowest[0] is None and lowest[1] == lowest[2] >= lowest[3] > 0
    best = looks_at[1 if lowest[3] < lowest[2] else 0]
    assert same(watched.vectors["expert.0"], best) and same(watched.vectors["best"], best)
    assert not same(best, tiny_run("fedavg", run__rounds=4, **PARTS).vectors["expert.0"])


@pytest.mark.runs
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "finetune", "specialist", "fedsr", "fedadg"])
def test_a_run_ends_where_the_model_becomes_no_better(name: str, tiny_run: TinyRunner) -> None:
    """The rate is so small that nothing becomes better; the model of the end has a checkpoint, whatever is due."""
    changes: dict[str, Any] = {"train__lr": 1e-9, "early_stopping__patience": 2, "run__rounds": 30}
    changes |= {"moe__trainable": "all", "run__checkpoint_every": 100, "adapt__max_epochs": 1}
    found = tiny_run(name, run__evaluate_every=30, **PARTS, **EVERY, **changes)
    records = read_metrics(found.config.run_dir)
    assert 4 <= len(records) < 30
    assert records[-1]["ended"] and "evaluation" in records[-1]
    assert not any("ended" in record for record in records[:-1])
    results = read_recorded(found.config.run_dir).results
    assert results["accuracy"] is not None
    assert same(found.vectors["expert.0"], found.vectors["best"])
    assert same(open_run(found.config.run_dir).vectors["expert.0"], found.vectors["best"])


@pytest.mark.runs
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_ends_with_the_same_bits(at: int, tiny_run: TinyRunner) -> None:
    changes: dict[str, Any] = {"run__rounds": 6, "run__checkpoint_every": 1, "run__keep_checkpoints": 6} | PARTS | EVERY
    whole = tiny_run("fedavg", **changes)
    cut = tiny_run("fedavg", run__name="cut", **changes)
    for path in (cut.config.run_dir / "checkpoints").glob("round-*"):
        if int(path.name.split("-")[1]) > at:
            path.unlink()
    again = tiny_run("fedavg", run__name="cut", run__resume=True, **changes)
    assert same_weights(again, whole)
    assert same(again.vectors["looks"], whole.vectors["looks"])
    assert not same(whole.vectors["expert.0"], tiny_run("fedavg", **PARTS, run__rounds=6).vectors["expert.0"])


@pytest.mark.runs
def test_a_run_that_ended_is_not_gone_on_with_and_one_of_more_rounds_is_another(tiny_run: TinyRunner) -> None:
    changes: dict[str, Any] = {"train__lr": 1e-9, "early_stopping__patience": 2, "run__rounds": 30, **PARTS, **EVERY}
    ended = tiny_run("fedavg", run__name="ended", **changes)
    rounds = len(read_metrics(ended.config.run_dir))
    again = tiny_run("fedavg", run__name="ended", run__resume=True, **changes)
    assert same_weights(again, ended)
    assert len(read_metrics(again.config.run_dir)) == rounds
    with pytest.raises(FedjetsError, match=r"run\.rounds"):
        tiny_run("fedavg", run__name="ended", run__resume=True, **changes | {"run__rounds": 40})


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partition__val_share": 0.0}, "set partition.val-share to 0.2"),
        ({"strategy__name": "fedjets"}, "strategy.name = 'fedjets' ends with its last round; set it to 0"),
        ({"strategy__name": "scaffold"}, "strategy.name = 'scaffold' ends with its last round; set it to 0"),
        ({"run__rounds": 6, "early_stopping__check_every": 5}, "the second look comes in round 7, and run.rounds = 6"),
        ({"privacy__noise_multiplier": 1.0, "model__norm": "group"}, "does not protect the losses"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Scalar], says: str) -> None:
    with pytest.raises(FedjetsError, match="early-stopping.check-every") as error:
        validate(tiny(**{"strategy__name": "fedavg", **PARTS, **EVERY, **changes}))
    assert says in str(error.value)
