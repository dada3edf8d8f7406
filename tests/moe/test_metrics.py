import math
from dataclasses import replace

import pytest
import torch

from fedjets_flwr.moe.metrics import (
    PRIORS,
    READINGS,
    ClientResult,
    count_inspection,
    count_predictions,
    right_predictions,
    routing,
    summarise,
)

# Two experts, four samples, three classes: the first entries are what each expert answers.
PROBS = torch.tensor(
    [
        [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.5, 0.4, 0.1]],  # answers 0 0 2 0
        [[0.1, 0.8, 0.1], [0.1, 0.6, 0.3], [0.3, 0.4, 0.3], [0.2, 0.7, 0.1]],  # answers 1 1 1 1
    ]
)
WEIGHTS = torch.tensor([[0.6, 0.2], [0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])
COMMON = torch.full((4, 3), 1 / 3)
LABELS = torch.tensor([0, 1, 1, 1])


def test_count_predictions_by_hand() -> None:
    """The gate takes expert 5, 2, 5 (a tie: the first) and 5, which stand at positions 0, 1, 0, 0.

    Top-1 answers 0 1 2 0: samples 0 and 1 are right. The mixture has weights (3/4, 1/4), (1/4, 3/4), (1/2, 1/2) and
    (3/4, 1/4): sample 2 is (.25, .3, .45) -> 2, sample 3 is (.425, .475, .1) -> 1, so 0, 1 and 3 are right. The mean:
    sample 0 is (.45, .45, .1), a tie that goes to class 0; samples 1 and 3 are right, sample 2 says 2.
    """
    found = count_predictions([(PROBS, WEIGHTS)], COMMON, True, (5, 2), LABELS, LABELS, 3)
    right = dict(zip(READINGS, found["right"], strict=True))
    assert right["top-1/none"] == 2
    assert right["mixture/none"] == 3
    assert right["blend/none"] == 3  # a common expert that knows nothing changes no answer
    assert right["mean/none"] == 3
    assert right["familiar/none"] == int((COMMON.argmax(1) == LABELS).sum())  # which is to be kept
    assert found["answered"] == [1, 2, 0, 0, 1, 0]
    assert found["answered-right"] == [1, 0, 0, 0, 1, 0]
    assert found["classes"] == [1, 3, 0]


def test_a_mask_takes_away_the_classes_that_are_absent() -> None:
    """Class 2 does not occur. Top-1 of sample 2 is (.2, .2, .6): masked, a tie of 0 and 1 that goes to 0, wrong.

    The mixture of sample 2 is (.25, .3, .45): masked it says 1, which is right.
    """
    right = dict(
        zip(
            READINGS,
            count_predictions([(PROBS, WEIGHTS)], COMMON, True, (5, 2), LABELS, LABELS, 3)["right"],
            strict=True,
        )
    )
    assert right["top-1/masked"] == 2
    assert right["mixture/masked"] == 4


def test_right_predictions_are_in_the_order_of_the_priors() -> None:
    probs = torch.tensor([[0.3, 0.1, 0.6], [0.1, 0.5, 0.4]])
    found = dict(zip(PRIORS, right_predictions(probs, torch.tensor([0, 1])), strict=True))
    assert (found["none"], found["masked"]) == (1, 2)


def test_count_inspection_by_hand() -> None:
    """Expert 0 answers 0 0 2 0, expert 1 always 1; the labels are 0 1 1 1."""
    assert count_inspection(PROBS, LABELS, LABELS, 3) == [1, 0, 0, 0, 3, 0]


def client(experts: tuple[int, ...], answered: list[list[int]], right: int, entropy: float = 0.5) -> ClientResult:
    table = torch.tensor(answered)
    counts = [right] * len(READINGS)
    counts[READINGS.index("mean/none")] = 0
    return ClientResult(
        experts=experts,
        samples=int(table.sum()),
        right=counts,
        answered=table,
        answered_right=torch.zeros_like(table),
        classes=table.sum(dim=0),
        gate_entropy=entropy,
        kept_common=None,
    )


def results() -> dict[int, ClientResult]:
    return {
        20: client((2, 0), [[3, 0, 1], [0, 4, 0]], 4, 0.2),
        21: client((1, 2), [[1, 0, 0], [0, 0, 1]], 2, 0.6),
    }


def test_of_clients_that_compared_it_tells_who_kept_the_common_expert() -> None:
    compared = {c: replace(r, kept_common=c == 21) for c, r in results().items()}
    found = summarise(compared, "familiar/none", 3, True)
    assert found["kept_common"] == [21]
    assert found["accuracy"] == pytest.approx(0.75)
    assert isinstance(found["readings"], dict)
    assert set(found["readings"]) == set(READINGS)
    assert summarise(results(), "familiar/none", 3, True)["accuracy"] == pytest.approx(0.75)  # no anchor told anything


def test_summarise_is_the_mean_over_clients() -> None:
    """Client 20: 4 of 8 right, half answered by each of experts 2 and 0; client 21: 2 of 2, by experts 1 and 2."""
    found = summarise(results(), "top-1/none", 3, True)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["per_client_accuracy"] == {20: 0.5, 21: 1.0}
    assert found["expert_load"] == pytest.approx([0.25, 0.25, 0.5])
    assert found["gate_entropy"] == pytest.approx(0.4)
    assert found["chosen"] == {20: [2, 0], 21: [1, 2]}
    assert "kept_common" not in found
    assert found["collapsed"] is False
    readings = found["readings"]
    assert isinstance(readings, dict)
    assert set(readings) == {name for name in READINGS if not name.startswith("familiar")}
    assert readings["mean/none"] == 0
    assert summarise(results(), "mean/none", 3, False)["accuracy"] == 0


@pytest.mark.parametrize(("experts", "gated", "collapsed"), [(3, True, True), (3, False, False), (1, True, False)])
def test_one_expert_that_answers_all_is_a_collapse_of_the_gate(experts: int, gated: bool, collapsed: bool) -> None:
    found = summarise({9: client((0,), [[4, 4, 4]], 6)}, "top-1/none", experts, gated)
    assert found["collapsed"] is collapsed


def test_routing_by_hand() -> None:
    """The best experts of classes 0, 1, 2 are 2, 0 and 1.

    Client 20 holds 2 and 0: expert 2 answered 3 of class 0 and expert 0 answered 4 of class 1, so 7 of 8; covered are
    classes 0 and 1, 7 of 8. Client 21 holds 1 and 2: expert 1 answered class 0 and expert 2 class 2, so none of 2;
    covered are classes 0 and 2, all.
    """
    accuracy = torch.tensor([[0.2, 0.9, 0.1], [0.3, 0.5, 0.8], [0.7, 0.1, 0.2]])
    found = routing(results(), accuracy)
    assert found["sample_share"] == pytest.approx(7 / 10)
    assert found["coverage"] == pytest.approx((7 / 8 + 1) / 2)


def test_routing_ignores_accuracies_that_are_unknown() -> None:
    accuracy = torch.tensor([[0.2, 0.9, math.nan], [math.nan, 0.5, 0.8], [0.7, math.nan, 0.2]])
    assert routing(results(), accuracy)["sample_share"] == pytest.approx(7 / 10)
