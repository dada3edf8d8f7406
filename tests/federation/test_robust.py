"""Robust rules: closed forms by hand, breakdown points, and runs with a client that attacks."""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import strategies
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Aggregation, Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import (
    Robust,
    RunningMeans,
    bounded_weights,
    clients_needed,
    clipped_mean,
    coordinate_median,
    grew,
    krum,
    make_aggregator,
    trimmed_mean,
)
from tests.support.faults import Runner, all_weights_finite, clients_of, failures, same, tampering
from tests.support.in_process import Finished

RULES = ("clip", "median", "trimmed-mean", "krum")
HUGE = struct.pack("<f", 1e15)


def settings(**values: Any) -> Aggregation:
    """Return settings whose clipping is to one median, but for what is given."""
    return Aggregation.model_validate({"clip-times": 1.0} | {k.replace("_", "-"): v for k, v in values.items()})


def combine(rule: str, vectors: list[Tensor], old: Tensor, weights: list[float] | None = None, **more: Any) -> Tensor:
    robust = Robust({"a": old}, settings(rule=rule, **more))
    for vector, weight in zip(vectors, weights or [1.0] * len(vectors), strict=True):
        robust.add("a", vector, weight)
    return robust.result()["a"]


# Weights and sizes ----------------------------------------------------------------------------------------------------


def test_a_weight_is_at_most_so_many_times_the_median() -> None:
    samples = {0: 10, 1: 12, 2: 10_000_000, 3: 8, 4: 55}
    assert bounded_weights(samples, 5.0) == {0: 10, 1: 12, 2: 60, 3: 8, 4: 55}
    assert bounded_weights(samples, 0.0) == samples
    assert bounded_weights({}, 5.0) == {}


def test_a_vector_grew_if_it_is_longer_than_so_many_times_what_it_was_or_than_so_many() -> None:
    assert grew(torch.tensor([21.0]), torch.tensor([2.0]), 10.0)
    assert not grew(torch.tensor([19.0]), torch.tensor([2.0]), 10.0)
    assert not grew(torch.tensor([9.0]), torch.tensor([0.0]), 10.0)
    assert grew(torch.tensor([1e30]), torch.tensor([2.0]), 1000.0)
    assert not grew(torch.tensor([1e30]), torch.tensor([2.0]), 0.0)
    assert grew(torch.tensor([2.0]), torch.tensor([1.5]), 1.0)
    assert not grew(torch.tensor([1.0]), torch.tensor([0.5]), 1.0)


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_clipping_to_a_given_norm() -> None:
    """(3, 4) has norm 5 and is cut to 2.5: (1.5, 2); (0, 1) stays."""
    updates = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    found = clipped_mean(updates, settings(clip_norm=2.5))
    torch.testing.assert_close(found, torch.tensor([1.5 / 2, (2 + 1) / 2]))


def test_clipping_to_the_median_norm() -> None:
    """Norms 1, 5, 100: the bound is 5."""
    updates = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, -100.0]])
    found = clipped_mean(updates, settings())
    torch.testing.assert_close(found, torch.tensor([4 / 3, -1 / 3]))


def test_clipping_to_so_many_medians() -> None:
    updates = torch.tensor([[1.0], [2.0], [40.0]])
    assert clipped_mean(updates, settings(clip_times=3.0)).tolist() == [3.0]
    assert combine("clip", list(updates), torch.zeros(1), clip_times=3.0).tolist() == [3.0]


def test_clipping_of_updates_that_are_all_zero() -> None:
    assert clipped_mean(torch.zeros(3, 2), settings()).tolist() == [0, 0]


def test_medians() -> None:
    odd = torch.tensor([[1.0, -5.0], [2.0, 7.0], [100.0, 0.0]])
    assert coordinate_median(odd, settings()).tolist() == [2, 0]
    even = torch.cat([odd, torch.tensor([[4.0, 2.0]])])
    assert coordinate_median(even, settings()).tolist() == [3, 1]


def test_trimmed_means() -> None:
    """One of five goes at each end with a share of 0.2, two with 0.4; never all."""
    updates = torch.tensor([[9.0], [1.0], [2.0], [4.0], [-80.0]])
    assert trimmed_mean(updates, settings(trim=0.2)).tolist() == pytest.approx([7 / 3])
    assert trimmed_mean(updates, settings(trim=0.4)).tolist() == [2]
    assert trimmed_mean(updates, settings(trim=0.01)).tolist() == pytest.approx([7 / 3])
    assert trimmed_mean(updates[:1], settings()).tolist() == [9]


def test_krum() -> None:
    """n = 5, f = 1: the sum of squared distances to the 2 nearest of the others.

    0: 1 + 9 = 10; 1: 1 + 4 = 5; 3: 0.25 + 4 = 4.25; 3.5: 0.25 + 6.25 = 6.5; so 3 wins.
    """
    updates = torch.tensor([[0.0], [1.0], [3.0], [3.5], [90.0]])
    assert krum(updates, settings(byzantine=1)).tolist() == [3]


def test_krum_looks_at_all_neighbours_but_the_farthest() -> None:
    """n = 6, f = 1: three neighbours each. Of 0, 0, 10, 11, 12, 90 the squares sum to 0 + 100 + 121 for the first two,
    and to 1 + 4 + 100, 1 + 1 + 121, 1 + 4 + 144 for the next; with two neighbours the first would win, with 0."""
    updates = torch.tensor([[0.0], [0.0], [10.0], [11.0], [12.0], [90.0]])
    assert krum(updates, settings(byzantine=1)).tolist() == [10]


def test_krum_gives_one_of_the_updates_bit_by_bit() -> None:
    updates = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    found = krum(updates, settings(byzantine=2))
    assert any(same(found, update) for update in updates)


def test_krum_with_many_clients_far_from_zero() -> None:
    """Distances by matrix products lose all digits here; the honest updates differ in the seventh."""
    generator = torch.Generator().manual_seed(1)
    honest = 100 + 1e-3 * torch.randn(30, 200, generator=generator)
    bad = 100 + 5e-2 * torch.randn(3, 200, generator=generator)
    updates = torch.cat([bad, honest])
    exact = (updates.double()[:, None] - updates.double()[None]).square().sum(dim=2).sort(dim=1).values[:, 1:29]
    assert same(krum(updates, settings(byzantine=3)), updates[exact.sum(dim=1).argmin()])


# Properties -----------------------------------------------------------------------------------------------------------

floats = st.floats(-1000, 1000, width=32)


@st.composite
def attacked(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    honest = draw(st.lists(floats, min_size=2, max_size=8))
    bad = draw(st.lists(st.floats(-(2.0**120), 2.0**120, width=32), max_size=len(honest) - 1))
    return honest, bad


@given(attacked())
def test_fewer_bad_than_honest_clients_cannot_move_the_median_out_of_the_honest_range(
    values: tuple[list[float], list[float]],
) -> None:
    honest, bad = values
    everyone = torch.tensor([*bad, *honest]).unsqueeze(1)
    found = float(coordinate_median(everyone, settings()))
    assert min(honest) <= found <= max(honest)


@given(attacked())
def test_as_many_bad_clients_as_are_cut_cannot_move_the_trimmed_mean(values: tuple[list[float], list[float]]) -> None:
    honest, bad = values
    everyone = torch.tensor([*bad, *honest]).unsqueeze(1)
    share = min(0.499, (len(bad) + 0.01) / len(everyone))
    found = float(trimmed_mean(everyone, settings(trim=share)))
    slack = 1e-4 * (1 + max(abs(v) for v in honest))
    assert min(honest) - slack <= found <= max(honest) + slack


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(values: list[tuple[float, float]], random: Any) -> None:
    vectors = [torch.tensor(pair) for pair in values]
    shuffled = random.sample(vectors, len(vectors))
    old = torch.zeros(2)
    for rule in ("median", "trimmed-mean", "clip"):
        a, b = combine(rule, vectors, old), combine(rule, shuffled, old)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-2)
        if rule == "median" and len(vectors) >= 3:
            assert torch.equal(a, b)


@given(st.floats(1e-45, 1e-38), st.floats(1.0, 1e4))
def test_weights_of_any_ratio_give_a_finite_mean(small: float, large: float) -> None:
    """A saturated gate gives an expert next to no mass at one client and all of it at another."""
    means = RunningMeans()
    means.add("a", torch.tensor([1.0]), small)
    means.add("a", torch.tensor([3.0]), large)
    assert means.result()["a"].tolist() == pytest.approx([3.0])


@pytest.mark.parametrize("rule", RULES)
def test_too_few_clients_are_clipped(rule: str) -> None:
    """Of two updates the longer one is cut to the norm of the shorter: (1 + 1) / 2 in place of (1 + 99) / 2."""
    assert combine(rule, [torch.tensor([11.0]), torch.tensor([109.0])], torch.tensor([10.0])).tolist() == [11]
    assert combine(rule, [torch.tensor([11.0])], torch.tensor([10.0])).tolist() == [11]


def test_the_bound_of_a_vector_is_the_median_norm_of_all_experts_of_the_round() -> None:
    """Norms 0.1, 0.5 and 9 of three experts: the third is cut to 0.5; the gate, of its own kind, is not."""
    old = {name: torch.zeros(2) for name in ("expert.0", "expert.1", "expert.2", "gate")}
    robust = Robust(old, settings(rule="clip"))
    for name, size in (("expert.0", 0.1), ("expert.1", 0.5), ("expert.2", 9.0), ("gate", 7.0)):
        robust.add(name, torch.tensor([0.0, size]), 1)
    found = {name: float(vector[1]) for name, vector in robust.result().items()}
    assert found == pytest.approx({"expert.0": 0.1, "expert.1": 0.5, "expert.2": 0.5, "gate": 7.0})


def test_a_bound_of_the_settings_takes_the_place_of_the_median() -> None:
    """Updates (0, 3) and (8, 0), both cut to 0.25."""
    vectors = [torch.tensor([0.0, 3.0]), torch.tensor([8.0, 0.0])]
    found = combine("clip", vectors, torch.zeros(2), clip_norm=0.25)
    torch.testing.assert_close(found, torch.tensor([0.125, 0.125]))


def test_clients_are_counted() -> None:
    robust = Robust({"a": torch.zeros(1)}, settings(rule="median"))
    for value in (1.0, 2.0, 3.0):
        robust.add("a", torch.tensor([value]), 1)
    assert robust.counts == {"a": 3}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_client_says_it_weighs_makes_no_difference_to_a_robust_rule(rule: str) -> None:
    vectors = [torch.tensor([float(value)]) for value in (1, 2, 3, 4, 50)]
    equal = combine(rule, vectors, torch.zeros(1))
    assert torch.equal(combine(rule, vectors, torch.zeros(1), [1.0, 1.0, 1.0, 1.0, 1e7]), equal)


def test_clients_that_a_rule_needs() -> None:
    needed = {rule: clients_needed(settings(rule=rule, byzantine=2)) for rule in ("mean", *RULES)}
    assert needed == {"mean": 1, "clip": 1, "median": 3, "trimmed-mean": 3, "krum": 7}


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_what_nobody_sent_is_absent_and_weight_zero_has_no_say(rule: str) -> None:
    aggregator = make_aggregator(settings(rule=rule), {"a": torch.zeros(1), "b": torch.zeros(1)})
    aggregator.add("a", torch.tensor([5.0]), 2)
    aggregator.add("b", torch.tensor([5.0]), 0)
    assert aggregator.counts == {"a": 1}
    assert {name: vector.tolist() for name, vector in aggregator.result().items()} == {"a": [5]}


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("robust"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_each_rule(run: Runner, rule: str) -> None:
    found = run(strategy__name="fedjets", aggregation__rule=rule)
    assert failures(found) == [{}, {}, {}]
    assert all_weights_finite(found)
    start, mean = found.strategy.state(), run(strategy__name="fedjets")
    for name in ("expert.0", "gate"):
        assert not same(found.vectors[name], start[name])
        assert not same(found.vectors[name], mean.vectors[name])


def flip(content: RecordDict, client: int, start: dict[str, Tensor], factor: float) -> None:
    """Send start - factor * update in place of start + update."""
    arrays: dict[str, Array] = {}
    for name, array in content.array_records["vectors"].items():
        old = start[name.removeprefix(f"{client}.")].numpy()
        sent = np.frombuffer(array.data, np.float32)
        arrays[name] = Array("float32", array.shape, array.stype, (old - factor * (sent - old)).tobytes())
    content["vectors"] = ArrayRecord(arrays)


def moved(method: Finished, start: dict[str, Tensor]) -> Tensor:
    return method.vectors["expert.0"] - start["expert.0"]


@pytest.mark.parametrize("attackers", [1, 3])
def test_a_sign_flip_takes_the_mean_over_and_not_the_robust_rules(run: Runner, attackers: int) -> None:
    """x10, one round, nine clients: flipped the mean points backwards; the rules keep length and direction.

    Without batch norm: flipped variances would be negative, and refused.
    """
    base: dict[str, Scalar] = {"strategy__name": "fedavg", "run__rounds": 1, "model__norm": "group"}
    clean = run(**base)
    start = clean.strategy.state()
    honest = moved(clean, start)
    trained: list[int] = []

    def attack(message_type: str, at: int, content: RecordDict) -> None:
        if message_type.startswith("train"):
            (client,) = clients_of(content)
            if client in clean.rounds.cohort.normals[:attackers]:
                trained.append(client)
                flip(content, client, start, 10.0)

    def attacked_by(**changes: Scalar) -> Tensor:
        found = run(tampering(attack), **base, **changes)
        assert failures(found) == [{}]
        return moved(found, start)

    def cosine(update: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(update, honest, dim=0))

    mean = attacked_by()
    assert len(trained) == attackers
    assert cosine(mean) < 0
    rules: dict[str, dict[str, Scalar]] = {"median": {}, "trimmed-mean": {"aggregation__trim": 0.34}}
    rules |= {"krum": {"aggregation__byzantine": attackers}} if attackers < 4 else {}
    for rule, more in rules.items():
        update = attacked_by(aggregation__rule=rule, **more)
        assert float(update.norm()) < 2.5 * float(honest.norm()), rule
        assert cosine(update) > 0.1, rule
    clipped = attacked_by(aggregation__rule="clip", aggregation__clip_times=1.0)
    assert float(clipped.norm()) < 1.5 * float(honest.norm())
    assert cosine(clipped) > (0.3 if attackers == 1 else 0)


def test_scaffold_refuses_robust_rules_that_its_variates_would_escape() -> None:
    settings = Config.from_flat({"strategy.name": "scaffold", "aggregation.rule": "median"})
    with pytest.raises(FedjetsError, match=r"aggregation\.rule"):
        strategies.strategy("scaffold").validate(settings)
