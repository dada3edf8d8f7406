import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedjets_flwr.moe.label_prior import (
    ESTIMATES,
    em_prior,
    estimates,
    group_prior,
    map_prior,
    present_classes,
    support_of,
    with_prior,
)


def correct(probs: Tensor) -> Tensor:
    return with_prior(probs, em_prior(probs))


def calibrated(prior: list[float], samples: int = 20_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs of the Bayes classifier for balanced classes, on samples whose classes follow ``prior``; their labels.

    Class c is a unit normal in C dimensions around 1.5 e_c, so p(c | x) = softmax(1.5 x)_c under equal shares.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(prior), samples, replacement=True, generator=generator)
    x = torch.randn(samples, len(prior), generator=generator, dtype=torch.float64)
    x += 1.5 * torch.eye(len(prior), dtype=torch.float64)[labels]
    return (1.5 * x).softmax(dim=1), labels


@pytest.mark.parametrize("prior", [[0.7, 0.2, 0.1], [0.5, 0.5, 0.0, 0.0], [0.9, 0.05, 0.05], [0.25] * 4])
def test_em_recovers_the_shares_of_a_calibrated_classifier(prior: list[float]) -> None:
    assert em_prior(calibrated(prior)[0]).tolist() == pytest.approx(prior, abs=0.02)


def test_the_correction_helps_where_the_shares_are_skewed() -> None:
    probs, labels = calibrated([0.8, 0.15, 0.05])
    before, after = (float((p.argmax(1) == labels).double().mean()) for p in (probs, correct(probs)))
    assert after > before + 0.05


def test_uniform_outputs_stay_uniform() -> None:
    probs = torch.full((7, 4), 0.25)
    assert em_prior(probs).tolist() == pytest.approx([0.25] * 4)
    torch.testing.assert_close(correct(probs), probs.double())


def test_one_em_step_by_hand() -> None:
    """From (1/2, 1/2) the first step is the mean output, (3/4 + 1/4 + 3/4) / 3 = 7/12."""
    probs = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25]])
    assert em_prior(probs, iterations=1).tolist() == pytest.approx([7 / 12, 5 / 12])


def test_with_prior_by_hand() -> None:
    """(.5 * .2, .5 * .8) / (.1 + .4)."""
    assert with_prior(torch.tensor([[0.5, 0.5]]), torch.tensor([0.2, 0.8])).tolist() == [pytest.approx([0.2, 0.8])]


def test_a_sample_that_the_prior_rules_out_gets_the_prior() -> None:
    prior = torch.tensor([0.0, 0.3, 0.7])
    found = with_prior(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]), prior)
    torch.testing.assert_close(found, prior.double().expand(2, 3))


rows = st.integers(2, 5).flatmap(
    lambda c: st.tuples(
        st.lists(st.lists(st.floats(0.01, 1), min_size=c, max_size=c), min_size=1, max_size=6),
        st.lists(st.floats(0.01, 1), min_size=c, max_size=c),
    )
)


@given(rows)
def test_every_result_is_a_distribution(case: tuple[list[list[float]], list[float]]) -> None:
    probs, prior = torch.tensor(case[0]), torch.tensor(case[1])
    probs = probs / probs.sum(1, keepdim=True)
    for found in (with_prior(probs, prior), correct(probs), em_prior(probs)[None]):
        assert found.min() >= 0
        torch.testing.assert_close(found.sum(1), torch.ones(len(found), dtype=torch.float64))


def test_a_mask_zeroes_absent_classes() -> None:
    mask = present_classes(torch.tensor([3, 1, 1]), 5)
    assert mask.tolist() == [0, 1, 0, 1, 0]
    found = with_prior(torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.2]]), mask)
    assert found.tolist() == [pytest.approx([0, 0.5, 0, 0.5, 0])]


def test_the_support_is_the_classes_above_two_percent_and_they_count_alike() -> None:
    probs, _ = calibrated([0.7, 0.28, 0.01, 0.01])
    assert [share > 0.005 for share in em_prior(probs).tolist()] == [True] * 4
    assert support_of(em_prior(probs)).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert support_of(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert support_of(torch.tensor([0.02, 0.0199, 0.97])).tolist() == [0.5, 0.0, 0.5]
    many = torch.full((100,), 0.01, dtype=torch.float64)  # none has two percent
    assert torch.equal(support_of(many), many)


def test_one_map_step_by_hand() -> None:
    """Two sure samples of class 0: its share is (2 + 1) / (2 + 2 * 1), and EM's is 1."""
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert map_prior(probs).tolist() == pytest.approx([0.75, 0.25])
    assert em_prior(probs).tolist() == pytest.approx([1.0, 0.0])


def test_few_samples_are_drawn_to_equal_shares_and_many_are_not() -> None:
    probs, _ = calibrated([0.7, 0.2, 0.1])
    for count, near in ((5, False), (20_000, True)):
        few = probs[:count]
        assert (float((map_prior(few) - em_prior(few)).abs().max()) < 0.01) is near


@pytest.mark.parametrize("name", ESTIMATES)
def test_every_estimate_is_shares_even_of_outputs_that_say_nothing(name: str) -> None:
    for probs in (torch.full((3, 4), 0.25), torch.eye(4), torch.zeros(2, 4)):
        shares = estimates(probs)[name]
        assert float(shares.sum()) == pytest.approx(1.0)
        assert bool((shares >= 0).all())


def test_estimates_are_those_of_their_names() -> None:
    probs, _ = calibrated([0.7, 0.28, 0.01, 0.01], 50)
    found = estimates(probs)
    assert torch.equal(found["em"], em_prior(probs))
    assert torch.equal(found["support"], support_of(em_prior(probs)))
    assert torch.equal(found["map"], map_prior(probs))


def test_em_is_the_sum_over_samples_of_their_corrected_outputs() -> None:
    """A sample that no class left can explain counts as the shares so far."""
    probs, _ = calibrated([0.6, 0.3, 0.1], 40)
    probs = torch.cat([probs, torch.zeros(2, 3)])
    q = torch.full((3,), 1 / 3, dtype=torch.float64)
    for steps in range(1, 6):
        q = with_prior(probs, q).mean(dim=0)
        torch.testing.assert_close(em_prior(probs, iterations=steps), q)
    settled = em_prior(probs)
    torch.testing.assert_close(with_prior(probs, settled).mean(dim=0), settled, atol=1e-6, rtol=0)
    smoothed = (with_prior(probs, map_prior(probs)).sum(dim=0) + 1) / (len(probs) + 3)
    torch.testing.assert_close(smoothed, map_prior(probs), atol=1e-6, rtol=0)


def test_a_mask_of_groups_keeps_the_likeliest_whole_ones() -> None:
    """Sums are (.9, .3, .2, .6): groups {0, 2} and {1, 3} have 1.1 and .9; of {0}, {1}, {2, 3} the last has .8."""
    probs = torch.tensor([[0.5, 0.1, 0.1, 0.3], [0.4, 0.2, 0.1, 0.3]])
    assert group_prior(probs, [frozenset({1, 3}), frozenset({0, 2})], 1).tolist() == [0.5, 0, 0.5, 0]
    groups = [frozenset({1}), frozenset({2, 3}), frozenset({0})]
    assert group_prior(probs, groups, 2).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    alike = [frozenset({column}) for column in reversed(range(40))]
    assert group_prior(torch.ones(2, 40) / 40, alike, 1).tolist() == [*[0] * 39, 1]
    assert group_prior(probs, [], 0).tolist() == [0.25] * 4
