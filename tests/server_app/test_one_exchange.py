"""Clients that read the server's memory choose their experts as they begin to train: one exchange, the same bits."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

import server_app.rounds
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.federation.privacy import Ledger
from fedjets_flwr.models.architectures import Architecture
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.messages import Job, Reply
from strategies.fedjets import FedJets
from tests.support.in_process import Finished, InProcessGrid
from tests.support.runs import Run, run
from tests.support.tiny import CannedReplies, tiny_method

__all__ = ["run"]  # the fixture
ROUNDS: dict[str, Scalar] = {"run__rounds": 4, "run__evaluate_every": 4, "cohort__anchors": 2, "moe__top_k": 2}


def recording(change: Any = None) -> tuple[type[InProcessGrid], list[str]]:
    """Return a grid that notes the types of all messages, and may change the content of a train reply in place."""
    kinds: list[str] = []

    class Recording(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            kinds.extend(message.metadata.message_type for message in messages)
            return super().push_messages(messages)

        def change(self, reply: Message) -> Message:
            if change is not None and reply.metadata.message_type.startswith("train"):
                change(reply.content)
            return reply

    return Recording, kinds


def counted(found: Finished) -> list[dict[str, Any]]:
    """Return what rounds cost their clients and who trained, without what the machine moved for it."""
    kept = ("cohort", "trained", "loss", "bytes_down", "bytes_up", "bytes_served", "failures", "evaluation")
    return [{key: record.get(key) for key in kept} for record in read_metrics(found.config.run_dir)]


@pytest.mark.parametrize("changes", [{}, {"gate__learns_from": "anchors"}, {"moe__trainable": "head"}], ids=str)
def test_one_exchange_gives_the_bits_and_bytes_of_two(run: Run, changes: dict[str, Scalar]) -> None:
    (one, in_one), (two, in_two) = recording(), recording()
    fast = run("fedjets", grid=one, transport__name="shared", **ROUNDS | changes)
    slow = run("fedjets", grid=two, transport__name="inline", **ROUNDS | changes)
    assert all(torch.equal(fast.vectors[name], vector) for name, vector in slow.vectors.items())
    assert counted(fast) == counted(slow)
    routed = Counter(in_two)["query.route"] - Counter(in_one)["query.route"]
    assert routed == 4  # one message to the one node in each round
    assert Counter(in_one)["query.route"] == 1  # of the unseen clients


def test_experts_that_are_large_are_not_copied_for_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app.rounds, "SMALL", 0)
    grid, kinds = recording()
    run("fedjets", grid=grid, transport__name="shared", **ROUNDS)
    assert Counter(kinds)["query.route"] == 5


def test_what_randomised_choices_tell_is_counted_all_the_same(run: Run) -> None:
    private: dict[str, Scalar] = {"privacy__route_epsilon": 1.0, **ROUNDS}
    ledgers = [Ledger(run("fedjets", transport__name=name, **private).config.run_dir) for name in ("shared", "inline")]
    assert ledgers[0].read() == ledgers[1].read()


@pytest.mark.parametrize("experts", [[1, 1], [0, 5], [-1, 0], [0], [0, 1, 2], 3, None])
def test_a_choice_that_is_none_is_refused_and_named(run: Run, experts: Any) -> None:
    """The first normal client of every round lies; nothing of it is averaged, and the others' count."""

    def lie(content: RecordDict) -> None:
        first = min(name for name in content if name.startswith("client.") and "experts" in content[name])
        content[first].pop("experts")  # type: ignore[union-attr]
        if experts is not None:
            content[first]["experts"] = experts  # type: ignore[index]

    grid, _ = recording(lie)
    found = run("fedjets", grid=grid, transport__name="shared", limits__max_failure_share=1.0, **ROUNDS)
    for record in read_metrics(found.config.run_dir):
        ((_, reason),) = record["failures"].items()
        assert "experts" in reason
        assert record["trained"]["gate"] == len(record["cohort"]) - 1


def test_experts_of_different_sizes_are_not_chosen_from(monkeypatch: pytest.MonkeyPatch) -> None:
    wider = [Architecture("cnn", 1 + m, "batch", "cifar", 1, 10) for m in range(3)]
    monkeypatch.setattr(FedJets, "architecture", lambda self, expert: wider[expert])
    assert tiny_method("fedjets", moe__trainable="all", moe__init="random").strategy.open_job(4) is None


def test_a_job_becomes_the_one_that_the_gate_would_have_led_to() -> None:
    strategy = tiny_method("fedjets").strategy
    job = strategy.open_job(4)
    assert (job.vectors, job.returns) == (
        ("expert.0", "expert.1", "expert.2", "gate"),
        ("choice.0", "choice.1", "gate"),
    )
    (planned,) = strategy.plan(Cohort((), (4,), 1), {4: (2, 0)})
    assert job.chosen((2, 0)) == planned
    assert (job.choose, planned.choose) == (2, 0)


def test_a_method_may_plan_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an open job asks is what the method's own plan asks."""
    plan = FedJets.plan

    def planned(self: FedJets, *of: Any) -> list[Job]:
        return [replace(job, cost=7, numbers={"a": 1}) for job in plan(self, *of)]

    monkeypatch.setattr(FedJets, "plan", planned)
    job = tiny_method("fedjets").strategy.open_job(4)
    assert (job.cost, job.numbers) == (7, {"a": 1, "choose": 2})


def test_the_audit_log_names_the_experts_that_were_chosen(run: Run) -> None:
    found = run("fedjets", transport__name="shared", **ROUNDS)
    lines = [json.loads(line) for line in (found.config.run_dir / "audit.jsonl").read_text().splitlines()]
    trained = [of for line in lines if line.get("kind") == "train.fedjets" for of in line["asked"].values()]
    assert {len(of["vectors"]) for of in trained} == {2, 3}  # an anchor's expert, or two of five, and the gate


def test_what_a_client_chose_is_counted_as_sent_to_it() -> None:
    method = tiny_method("fedjets", [reply := Reply(4, {}, {"experts": [2, 0]})])
    method.exchange.shares_memory = True
    (job,) = method.rounds._open_jobs(1, [4])
    method.rounds._pending = CannedReplies([reply], jobs={4: job})  # type: ignore[assignment]
    vectors = {"choice.0": torch.ones(1), "choice.1": torch.zeros(1), "gate": torch.full((1,), 2.0)}
    found = method.rounds._as_chosen(replace(reply, vectors=vectors))
    assert {name: float(vector) for name, vector in found.vectors.items()} == {"expert.2": 1, "expert.0": 0, "gate": 2}
    assert method.exchange.received == [(4, ["expert.2", "expert.0"])]
