import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedjets_flwr.moe.gating import (
    anchor_gate_loss,
    chosen_weights,
    entropy,
    keeps_common,
    label_offset,
    mixture_loss,
    read_blend,
    read_familiar,
    read_mean,
    read_mixture,
    read_surest,
    read_top_1,
    scores,
    surest,
    top_1_of,
    top_k_experts,
)

gate_outputs = st.integers(2, 6).flatmap(
    lambda m: st.lists(st.lists(st.floats(-8, 8, width=32), min_size=m, max_size=m), min_size=1, max_size=8)
)


def log(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_scores_are_a_softmax_over_all_experts() -> None:
    """softmax(ln 1, ln 2, ln 4) = (1, 2, 4) / 7."""
    assert scores(torch.tensor([log(1, 2, 4)])).tolist() == [pytest.approx([1 / 7, 2 / 7, 4 / 7])]


def test_top_k_sums_probabilities_not_logits() -> None:
    """Expert 0: probabilities 1 + 0 of two samples, the others 0 + 1/2 each; its logits sum to -10, theirs to 0."""
    logits = torch.tensor([[10.0, 0.0, 0.0], [-20.0, 0.0, 0.0]])
    assert logits.sum(0).argsort(descending=True, stable=True)[0] == 1
    assert top_k_experts(scores(logits), 1) == (0,)


def test_top_k_is_best_first() -> None:
    assert top_k_experts(torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.5, 0.4]]), 2) == (1, 2)


@pytest.mark.parametrize(("row", "chosen"), [([0.25] * 4, (0, 1)), ([0.2, 0.3, 0.2, 0.3], (1, 3))])
def test_ties_go_to_the_lower_id(row: list[float], chosen: tuple[int, ...]) -> None:
    assert top_k_experts(torch.tensor([row, row]), 2) == chosen


@given(gate_outputs, st.randoms(use_true_random=False))
def test_permuting_experts_permutes_the_choice(rows: list[list[float]], random: object) -> None:
    """Holds for untied sums, so close ones are made distinct by a bonus of one per rank."""
    sample_scores = scores(torch.tensor(rows))
    m = sample_scores.shape[1]
    sample_scores = sample_scores + torch.linspace(0, 2.0 * m, m)
    order = list(range(m))
    random.shuffle(order)  # type: ignore[attr-defined]
    for k in range(1, m + 1):
        permuted = top_k_experts(sample_scores[:, order], k)
        assert tuple(order[i] for i in permuted) == top_k_experts(sample_scores, k)


@given(gate_outputs)
def test_top_k_ignores_the_order_of_samples_and_nests(rows: list[list[float]]) -> None:
    sample_scores = scores(torch.tensor(rows)).mul(2**16).round().div(2**16)  # sums are exact, whatever their order
    m = sample_scores.shape[1]
    whole = top_k_experts(sample_scores, m)
    assert sorted(whole) == list(range(m))
    assert top_k_experts(sample_scores.flip(0), m) == whole
    assert all(top_k_experts(sample_scores, k) == whole[:k] for k in range(1, m))


def test_chosen_weights_raw_and_renormalised() -> None:
    sample_scores = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert chosen_weights(sample_scores, (2, 0), False).tolist() == [[0.125, 0.5]]
    assert chosen_weights(sample_scores, (2, 0), True).tolist() == [pytest.approx([0.2, 0.8])]


# Two experts, one sample, two classes; expert 0 says (3/4, 1/4), expert 1 says (1/4, 3/4).
LOGITS = torch.tensor([[log(3, 1)], [log(1, 3)]])
SCORES = torch.tensor([[0.5, 0.25, 0.25]])


@pytest.mark.parametrize(
    ("mix", "renormalise", "loss"),
    [
        # logits: (ln 3 / 2, ln 3 / 4); label 0: ln(1 + exp(-(ln 3) / 4))
        ("logits", False, math.log(1 + 3**-0.25)),
        # weights (2/3, 1/3): the difference is ln 3 / 3
        ("logits", True, math.log(1 + 3 ** (-1 / 3))),
        # 1/2 * 3/4 + 1/4 * 1/4 = 7/16
        ("probs", False, -math.log(7 / 16)),
        # 2/3 * 3/4 + 1/3 * 1/4 = 7/12
        ("probs", True, -math.log(7 / 12)),
    ],
)
def test_mixture_loss(mix: str, renormalise: bool, loss: float) -> None:
    weights = chosen_weights(SCORES, (0, 1), renormalise)
    assert float(mixture_loss(LOGITS, weights, torch.tensor([0]), mix)) == pytest.approx(loss, rel=1e-6)


def test_mixture_loss_is_the_batch_mean() -> None:
    """Sample 0 has label 0, sample 1 label 1 with the same outputs: the mean of -ln(7/12) and -ln(5/12)."""
    weights = chosen_weights(SCORES, (0, 1), True).repeat(2, 1)
    loss = mixture_loss(LOGITS.repeat(1, 2, 1), weights, torch.tensor([0, 1]), "probs")
    assert float(loss) == pytest.approx(-(math.log(7 / 12) + math.log(5 / 12)) / 2, rel=1e-6)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_an_offset_is_added_to_the_logits_of_each_class(mix: str) -> None:
    """One expert of weight 1 with outputs 3 : 1 and an offset of ln 1, ln 5: (3, 5) / 8."""
    loss = mixture_loss(LOGITS[:1], torch.ones(1, 1), torch.tensor([0]), mix, torch.tensor(log(1, 5)))
    assert float(loss) == pytest.approx(-math.log(3 / 8), rel=1e-6)


def test_label_offset_is_the_log_of_the_shares() -> None:
    """Shares 3/4, 1/4 and none, which counts as 1e-6."""
    found = label_offset(torch.tensor([0, 1, 0, 0]), 3)
    assert found.tolist() == pytest.approx(log(0.75, 0.25, 1e-6), abs=1e-5)


def test_anchor_gate_loss() -> None:
    """The gate gives expert 1 the scores 3/4 and 1/2."""
    loss = anchor_gate_loss(torch.tensor([log(1, 3), log(1, 1)]), 1)
    assert float(loss) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2, rel=1e-6)


PROBS = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.3, 0.7]]])
WEIGHTS = torch.tensor([[0.3, 0.1], [0.1, 0.4]])
COMMON = torch.tensor([[0.5, 0.5], [0.9, 0.1]])


def test_top_1_is_the_best_of_the_k() -> None:
    assert top_1_of(WEIGHTS).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (read_top_1, [[0.9, 0.1], [0.3, 0.7]]),
        # weights (3/4, 1/4) and (1/5, 4/5)
        (read_mixture, [[0.725, 0.275], [0.36, 0.64]]),
        # sqrt(.725) : sqrt(.275), and sqrt(.36 * .9) : sqrt(.64 * .1) = .569 : .253 = 9 : 4
        (
            read_blend,
            [[0.725**0.5 / (0.725**0.5 + 0.275**0.5), 0.275**0.5 / (0.725**0.5 + 0.275**0.5)], [9 / 13, 4 / 13]],
        ),
        (read_mean, [[0.55, 0.45], [0.45, 0.55]]),
    ],
)
def test_read_outs(read: object, expected: list[list[float]]) -> None:
    found: Tensor = read(PROBS, WEIGHTS, COMMON, False)  # type: ignore[operator]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_entropy_of_certain_uniform_and_one_half() -> None:
    """(1/2, 1/2, 0, 0) of M = 4 has ln 2 / ln 4 = 1/2."""
    rows = torch.tensor([[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    assert entropy(rows).tolist() == pytest.approx([0, 1, 0.5])


def test_entropy_of_a_single_expert_is_zero() -> None:
    assert entropy(torch.ones(3, 1)).tolist() == [0, 0, 0]


@given(gate_outputs)
def test_entropy_is_between_zero_and_one(rows: list[list[float]]) -> None:
    found = entropy(scores(torch.tensor(rows)))
    assert ((found >= 0) & (found <= 1 + 1e-5)).all()


def test_only_a_sample_without_weight_reads_equal_ones() -> None:
    found = read_mixture(PROBS, torch.tensor([[0.0, 0.0], [0.0, 0.5]]), COMMON, False)
    torch.testing.assert_close(found, torch.tensor([[0.55, 0.45], [0.3, 0.7]]))


def test_mixture_without_weight_is_a_distribution() -> None:
    found = read_mixture(PROBS, torch.zeros(2, 2), COMMON, False)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize(("mix", "renormalise"), [("logits", True), ("probs", False)])
def test_loss_stays_finite_when_the_chosen_scores_underflow(mix: str, renormalise: bool) -> None:
    gate = torch.tensor([[0.0, 0.0, 150.0]], requires_grad=True)
    loss = mixture_loss(LOGITS, chosen_weights(scores(gate), (0, 1), renormalise), torch.tensor([0]), mix)
    loss.backward()
    assert torch.isfinite(loss)
    assert gate.grad is not None
    assert torch.isfinite(gate.grad).all()


def test_the_surest_model_has_the_lowest_mean_entropy_over_all_samples() -> None:
    """Sure of one sample and not of the other (.35 nats) against half sure of both (.5 and .325); a tie: the first."""
    half, sure, most = [0.5, 0.5], [1.0, 0.0], [0.9, 0.1]
    assert surest(torch.tensor([[most, half], [sure, half], [half, half]])).tolist() == [0, 1, 0]
    assert surest(torch.tensor([[sure, half], [most, most], [half, sure]])).tolist() == [0, 1, 0]
    assert surest(torch.tensor([[half, sure], [sure, half]])).tolist() == [1, 0]
    assert surest(torch.tensor([[half, half]])).tolist() == [1]


def test_the_surest_expert_answers_all_samples_whatever_the_gate_says() -> None:
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.8, 0.2], [0.2, 0.8]]])
    for weights in (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.2, 0.8], [0.9, 0.1]])):
        assert torch.equal(read_surest(probs, weights, torch.ones(2, 2) / 2, False), probs[1])
    assert torch.equal(read_surest(probs[:1], torch.ones(2, 1), torch.ones(2, 2) / 2, False), probs[0])


def test_the_common_expert_is_kept_where_it_is_less_sure_than_usual_by_less() -> None:
    """Entropies are .693 and .325 nats: whoever is the surer, what counts is how much above the usual they are."""
    half, most = torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    for expert, common, usual, kept in (
        (half, most, (0.6, 0.1), False),
        (half, most, (0.1, 0.1), True),
        (most, half, (0.1, 0.6), True),
        (most, half, (0.3, 0.6), False),
        (most, most, (0.2, 0.2), False),  # a tie
    ):
        assert keeps_common(expert, common, usual) is kept


def test_the_best_expert_answers_unless_the_common_one_is_kept() -> None:
    assert torch.equal(read_familiar(PROBS, WEIGHTS, COMMON, False), read_top_1(PROBS, WEIGHTS, COMMON, False))
    assert torch.equal(read_familiar(PROBS, WEIGHTS, COMMON, True), COMMON)
