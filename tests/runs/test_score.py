"""The score of a method: where it lies, and which of two is better."""

from typing import Any

import pytest

from fedjets_flwr.runs.score import PARTICIPANTS_ACCURACY, UNSEEN_ACCURACY, Score, best_of, improves
from fedjets_flwr.runs.tensorboard import scalars_of
from fedjets_flwr.runs.tracking import results_of

BITS = Score("bits per byte", "lower", ("participants", "bits"))


def of(server_round: int, score: Score, value: float) -> dict[str, Any]:
    return {"round": server_round, "score": {"name": score.name, "better": score.better, "value": value}}


def test_a_record_that_measured_it_tells_it() -> None:
    record = {"evaluation": {"accuracy": 0.5}, "participants": {"local": 0.25, "bits": 2.0}}
    assert UNSEEN_ACCURACY.of(record)["score"]["value"] == 0.5
    assert PARTICIPANTS_ACCURACY.of(record)["score"]["value"] == 0.25
    assert BITS.of(record) == {"score": {"name": "bits per byte", "better": "lower", "value": 2.0}}
    assert UNSEEN_ACCURACY.of({}) == {}
    assert BITS.of({"participants": {}}) == {}


@pytest.mark.parametrize(("score", "better", "worse"), [(BITS, 1.0, 2.0), (UNSEEN_ACCURACY, 0.9, 0.8)])
def test_which_is_better(score: Score, better: float, worse: float) -> None:
    assert improves(of(1, score, better)["score"], worse)
    assert not improves(of(1, score, worse)["score"], better)
    assert not improves(of(1, score, better)["score"], better)
    assert improves(of(1, score, worse)["score"], None)


def test_the_summary_tells_the_last_and_the_first_of_the_best() -> None:
    records = [of(2, BITS, 2.0), {"round": 3}, of(4, BITS, 1.5), of(6, BITS, 1.5), of(8, BITS, 1.75)]
    assert best_of(records) == {
        "name": "bits per byte", "better": "lower", "value": 1.75, "best": 1.5, "best_round": 4,
    }  # fmt: skip
    assert best_of([{"round": 1}]) is None


def test_it_is_in_the_results_and_among_the_scalars() -> None:
    record = of(1, BITS, 1.5) | {"cohort": [], "failures": {}, "seconds": {}, "loss": 1.0}
    assert results_of([record])["score"]["best"] == 1.5
    assert scalars_of(record)["score"] == 1.5
