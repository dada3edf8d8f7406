"""Scoring clients that train: who is asked for what, what is made of the counts, and when."""

from typing import Any

import pytest

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.federation.cohort import draw_participants
from fedjets_flwr.moe.metrics import READINGS
from fedjets_flwr.wire.messages import Job, Reply
from server_app.scoring import Scoring
from tests.support.runs import TinyRunner, participants, tiny_run
from tests.support.tiny import TinyMethod, samples_of, tiny, tiny_method

__all__ = ["tiny_run"]

PARTS: dict[str, Scalar] = {
    "partition__val_share": 0.2, "partition__test_share": 0.2, "partition__samples_per_client": 40,
}  # fmt: skip
SAMPLES = {client: len(samples_of(tiny(), client)) for client in range(9)}


def told(client: int, local: Any, wide: Any = None) -> Reply:
    numbers = {"local": local} | ({"global": wide} if wide is not None else {})
    return Reply(client, {}, numbers)


def scoring(name: str, *given: Reply, **changes: Scalar) -> TinyMethod:
    method = tiny_method(name, given, **PARTS | changes)
    method.strategy.num_samples |= SAMPLES
    return method


def test_all_clients_that_train_or_as_many_as_asked_for() -> None:
    assert draw_participants(tiny()) == draw_participants(tiny(participants__clients=7)) == list(range(7))
    few = [draw_participants(tiny(participants__clients=3, run__seed=seed)) for seed in range(6)]
    for drawn in few:
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 3
        assert set(drawn) <= set(range(7))
    assert len({tuple(drawn) for drawn in few}) > 1
    assert few[1] == [0, 4, 6]
    assert draw_participants(tiny(participants__clients=1, run__seed=1)) == [6]
    assert few[1] == draw_participants(tiny(participants__clients=3, run__seed=1, run__rounds=9))
    assert set().union(*(draw_participants(tiny(participants__clients=1, run__seed=s)) for s in range(60))) == set(
        range(7)
    )


def test_they_get_what_is_personal_and_their_counts_become_means() -> None:
    method = scoring("finetune", *(told(c, [c, 8], [10 * c, 449]) for c in range(1, 5)))
    found: Any = method.rounds.scoring.own_tests(3, last=False)
    numbers = {"reading": READINGS.index("top-1/none")}
    jobs = [Job(c, ("expert.0",), (), numbers, cost=SAMPLES[c]) for c in range(7)]
    assert method.exchange.asked == [("evaluate.finetune", 3, jobs)]
    assert method.exchange.sent.keys() == {"expert.0"}
    assert method.exchange.served == [True]
    assert found["participants"] == {
        "local": pytest.approx((1 + 2 + 3 + 4) / 4 / 8), "global": pytest.approx(100 / 4 / 449),
        "clients": {c: {"local": [c, 8], "global": [10 * c, 449]} for c in range(1, 5)},
    }  # fmt: skip
    assert method.rounds.clients.failures == {}
    assert method.rounds.watch.seconds["participants"] > 0


def test_the_gate_chooses_for_them_and_that_is_served_too() -> None:
    method = scoring("fedjets", *(Reply(c, {}, {"experts": [2, 0], "local": [1, 2], "global": [1, 2]}) for c in (1, 4)))
    method.rounds.scoring.own_tests(3, last=False)
    route, evaluate = method.exchange.asked
    assert (route[:2], [job.client for job in route[2]]) == (("query.route", 3), list(range(7)))
    assert evaluate[0] == "evaluate.fedjets"
    assert [(job.client, job.vectors) for job in evaluate[2]] == [
        (c, ("expert.2", "expert.0", "gate")) for c in (1, 4)
    ]  # fmt: skip
    assert method.exchange.served == [True, True]


def test_without_shared_test_images_there_is_no_score_on_them() -> None:
    method = scoring("finetune", told(2, [1, 4]), told(3, [3, 4]))
    found: Any = method.rounds.scoring.own_tests(1, last=False)
    assert found == {"participants": {"local": 0.5, "clients": {2: {"local": [1, 4]}, 3: {"local": [3, 4]}}}}


@pytest.mark.parametrize("lie", [[3, 2], [0, 0], [1], [1, 2, 3], [-1, 2], [1, 10**9], None, [0.5, 1.0], 1])
@pytest.mark.parametrize("where", ["local", "global"])
def test_counts_that_cannot_be_are_refused_and_the_others_count(lie: Any, where: str) -> None:
    honest = {"local": [2, 4], "global": [1, 4]}
    bad = Reply(1, {}, honest | {where: lie})
    method = scoring("finetune", bad, Reply(2, {}, honest))
    method.rounds.clients.failures = {6: "from before"}
    found: Any = method.rounds.scoring.own_tests(1, last=False)
    assert found["participants"]["clients"] == {2: honest}
    assert set(method.rounds.clients.failures) == {1, 6}
    assert where in method.rounds.clients.failures[1]


def test_means_on_shared_images_are_over_those_who_have_them() -> None:
    found: Any = scoring("finetune", told(2, [1, 4], [1, 2]), told(3, [3, 4])).rounds.scoring.own_tests(1, last=False)
    assert (found["participants"]["local"], found["participants"]["global"]) == (0.5, 0.5)


def test_a_right_answer_to_every_sample_is_believed() -> None:
    found: Any = scoring("finetune", told(1, [4, 4], [1, 1])).rounds.scoring.own_tests(1, last=False)
    assert found["participants"]["local"] == 1.0


def test_an_oracle_of_domains_scores_what_tells_its_domain(tiny_run: TinyRunner) -> None:
    """The test images that all share do not."""
    run = tiny_run("fedjets", gate__mode="oracle", partition__name="domains", partition__public_share=0.2, **PARTS)
    found = participants(run)
    assert found["clients"]
    assert all("local" in counts and "global" not in counts for counts in found["clients"].values())


def test_who_gets_no_experts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    method = scoring("finetune", told(1, [4, 4], [1, 1]))
    monkeypatch.setattr(
        method.strategy, "personal", lambda clients, routes: {c: ("expert.0",) for c in clients if c != 3}
    )
    method.rounds.scoring.own_tests(1, last=False)
    assert method.rounds.clients.failures == {3: "it did not answer: which experts suit it is not known"}


def test_who_could_not_be_prepared_has_no_score_and_is_named() -> None:
    method = scoring("finetune", told(1, [4, 4], [1, 1]))
    del method.strategy.num_samples[3]
    method.rounds.scoring.own_tests(1, last=False)
    assert [job.client for job in method.exchange.asked[0][2]] == [0, 1, 2, 4, 5, 6]
    assert method.rounds.clients.failures == {3: "could not be prepared"}


def test_nobody_answers() -> None:
    assert scoring("finetune").rounds.scoring.own_tests(1, last=False) == {}


@pytest.mark.parametrize(
    ("every", "wanted"), [(0, [4]), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4])], ids=["end", "each", "2nd", "3rd"]
)
def test_they_are_scored_after_the_last_round_and_as_often_as_asked(
    monkeypatch: pytest.MonkeyPatch, every: int, wanted: list[int]
) -> None:
    scored: list[int] = []

    def score(self: Scoring, server_round: int, last: bool) -> dict[str, object]:
        scored.append(server_round)
        return {"participants": {"local": 0.25 * server_round}}

    monkeypatch.setattr(Scoring, "own_tests", score)
    records = rounds_of(scoring("local", participants__evaluate_every=every), monkeypatch)
    assert scored == wanted
    assert [record.get("score", {}).get("value") for record in records] == [
        0.25 * t if t in wanted else None for t in range(1, 5)
    ]
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    assert not any("evaluation" in record for record in records)


def test_without_test_parts_nobody_that_trains_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    method = tiny_method("fedavg")
    assert method.rounds.clients.participants == []
    assert scoring("fedavg", participants__clients=2).rounds.clients.participants == draw_participants(
        tiny(participants__clients=2, **PARTS)
    )


def rounds_of(method: TinyMethod, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Do all rounds of a method that asks nobody to train."""
    from fedjets_flwr.wire.exchange import Traffic

    exchange: Any = method.exchange
    exchange.traffic, exchange.coding_seconds, exchange.stream = Traffic(), 0.0, lambda messages: []
    grid: Any = None
    return [method.rounds._round(t, grid) for t in range(1, method.rounds.config.run.rounds + 1)]
