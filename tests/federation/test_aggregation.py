import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.federation.aggregation import PooledMeans, RunningMeans, all_finite, weights_hash
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.flat_model import FlatModel


def test_weighted_mean_by_hand() -> None:
    """(1 * (1, 2) + 3 * (5, 6)) / 4 = (4, 5); the gate came from one client alone."""
    means = RunningMeans()
    means.add("expert.0", torch.tensor([1.0, 2.0]), 1)
    means.add("gate", torch.tensor([7.0]), 1)
    means.add("expert.0", torch.tensor([5.0, 6.0]), 3)
    found = means.result()
    assert found["expert.0"].tolist() == [4, 5]
    assert found["gate"].tolist() == [7]


def test_what_nobody_sent_is_absent() -> None:
    means = RunningMeans()
    assert means.result() == {}
    means.add("expert.1", torch.ones(2), 5)
    assert set(means.result()) == {"expert.1"}


def test_a_weight_of_zero_has_no_say() -> None:
    means = RunningMeans()
    means.add("a", torch.tensor([9.0]), 0)
    means.add("b", torch.tensor([9.0]), 0)
    means.add("b", torch.tensor([3.0]), 0.5)
    found = means.result()
    assert set(found) == {"b"}
    assert found["b"].tolist() == [3]


def test_a_first_weight_of_next_to_nothing_counts_for_what_it_is() -> None:
    """(3e6 * 5e-7 + 1e6 * 5e-7 + 0 * 2) / 2.000001, with the second unit a million times the first and more."""
    means = RunningMeans()
    for value, weight in ((3e6, 5e-7), (1e6, 5e-7), (0.0, 2.0)):
        means.add("a", torch.tensor([value]), weight)
    assert means.result()["a"].tolist() == pytest.approx([2 / 2.000001], abs=1e-7)


def test_adding_leaves_the_sent_vectors_alone() -> None:
    first, second = torch.tensor([1.0]), torch.tensor([3.0])
    means = RunningMeans()
    means.add("a", first, 2)
    means.add("a", second, 2)
    means.result()
    assert (first.item(), second.item()) == (1, 3)


def test_means_can_be_read_twice() -> None:
    means = RunningMeans()
    means.add("a", torch.tensor([6.0]), 2)
    means.add("a", torch.tensor([2.0]), 2)
    means.result()
    assert means.result()["a"].tolist() == [4]


def test_sums_are_made_in_spare_memory() -> None:
    spare = {"a": torch.tensor([9.0]), "b": torch.tensor([9.0])}
    before, means = spare["a"], RunningMeans(spare)
    means.add("a", torch.tensor([1.0]), 1)
    means.add("a", torch.tensor([3.0]), 1)
    found = means.result()["a"]
    assert found.tolist() == [2]
    assert found is not before
    assert found.data_ptr() == before.data_ptr()
    assert set(spare) == {"b"}


@given(
    st.integers(1, 5).flatmap(
        lambda size: st.lists(
            st.tuples(st.lists(st.floats(-100, 100, width=32), min_size=size, max_size=size), st.integers(1, 10_000)),
            min_size=1,
            max_size=12,
        )
    )
)
def test_equals_the_average_in_float64(replies: list[tuple[list[float], int]]) -> None:
    means = RunningMeans()
    for vector, weight in replies:
        means.add("a", torch.tensor(vector), weight)
    values = np.array([vector for vector, _ in replies], dtype=np.float64)
    weights = np.array([weight for _, weight in replies], dtype=np.float64)
    # Float32 rounding grows with the number of replies and the largest value, cancellation included.
    tolerance = 1e-6 * len(replies) * max(1.0, float(np.abs(values).max()))
    np.testing.assert_allclose(means.result()["a"].numpy(), np.average(values, axis=0, weights=weights), atol=tolerance)


def test_hash_sees_every_bit_and_name_but_not_the_order() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    found = weights_hash({"a": a, "b": b})
    assert weights_hash({"b": b.clone(), "a": a.clone()}) == found
    flipped = a.clone()
    flipped.view(torch.int32)[1] ^= 1
    assert weights_hash({"a": flipped, "b": b}) != found
    assert weights_hash({"a": a, "c": b}) != found
    assert weights_hash({"a": torch.tensor([-0.0])}) != weights_hash({"a": torch.tensor([0.0])})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # the sum overflows, the vector does not
        ([1.0, float("nan")], False),
        ([float("inf"), float("-inf")], False),
        ([float("inf"), 1.0], False),
    ],
)
def test_all_finite(values: list[float], expected: bool) -> None:
    assert all_finite(torch.tensor(values)) is expected


def pooled(replies: list[tuple[list[float], float]], means: list[int], variances: list[int]) -> torch.Tensor:
    found = PooledMeans({"a": torch.tensor(means)}, {"a": torch.tensor(variances)}, RunningMeans())
    for values, weight in replies:
        found.add("a", torch.tensor(values), weight)
    return found.result()["a"]


def test_pooled_variance_by_hand() -> None:
    """Weight, mean, variance: (2, 0, 1) x 1 and (6, 4, 2) x 3: mean 3, Var = 7/4 + (0 + 3 * 16) / 4 - 9 = 4.75."""
    found = pooled([([2.0, 0.0, 1.0], 1.0), ([6.0, 4.0, 2.0], 3.0)], [1], [2])
    assert found.tolist() == [5.0, 3.0, 4.75]


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), min_size=1, max_size=6))
def test_pooled_variance_is_that_of_all_samples_together(clients: list[list[float]]) -> None:
    replies = [([float(np.mean(x)), float(np.var(x))], float(len(x))) for x in clients]
    everything = np.concatenate([np.array(x) for x in clients])
    found = pooled(replies, [0], [1])
    np.testing.assert_allclose(found.numpy(), [everything.mean(), everything.var()], rtol=1e-4, atol=1e-2)


def test_pooled_means_can_be_read_twice() -> None:
    means = PooledMeans({"a": torch.tensor([0])}, {"a": torch.tensor([1])}, RunningMeans())
    means.add("a", torch.tensor([0.0, 1.0]), 1.0)
    means.add("a", torch.tensor([2.0, 1.0]), 1.0)
    assert means.result()["a"].tolist() == means.result()["a"].tolist() == [1, 2]


def test_pooling_one_client_changes_no_bit() -> None:
    sent = [0.1, 0.7, 1.3]
    assert torch.equal(pooled([(sent, 7.0)], [1], [2]), torch.tensor(sent))


def test_positions_of_running_statistics() -> None:
    model = FlatModel(build(Architecture("cnn", 4, "batch", "cifar", 1, 10), 0))
    for number, module in enumerate(m for m in model.module.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        module.running_mean.fill_(10 + number)
        module.running_var.fill_(20 + number)
    assert model.vector[model.spec.positions("running_mean")].tolist() == [10.0] * 4 + [11.0] * 8
    assert model.vector[model.spec.positions("running_var")].tolist() == [20.0] * 4 + [21.0] * 8
    assert len(FlatModel(torch.nn.Linear(2, 3)).spec.positions("running_var")) == 0
