"""Which experts a client holds: search against brute force, and every rule of a change."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedjets_flwr.models.transformer import Sets
from fedjets_flwr.moe.structure import (
    Activation,
    Structure,
    advised,
    count,
    experts_that_fit,
    initial_sets,
    mean_activation,
    most_similar,
    next_structures,
    observed,
    pooled,
    random_sets,
    recommended,
    similarity,
    threshold,
)


@st.composite
def activations(draw: st.DrawFn, layers: int | None = None, experts: int | None = None) -> Activation:
    """Shares of tokens; some experts get none, and some the same."""
    num_layers = layers or draw(st.integers(1, 3))
    num_experts = experts or draw(st.integers(1, 4))
    table = []
    for _ in range(num_layers):
        counts = draw(
            st.lists(st.integers(0, 6), min_size=num_experts, max_size=num_experts).filter(lambda row: sum(row) > 0)
        )
        table.append(tuple(n / sum(counts) for n in counts))
    return tuple(table)


def all_sets(layers: int, experts: int) -> list[Sets]:
    ids = [c for k in range(1, experts + 1) for c in itertools.combinations(range(experts), k)]
    return list(itertools.product(ids, repeat=layers))


@st.composite
def sets(draw: st.DrawFn, layers: int, experts: int) -> Sets:
    return tuple(tuple(sorted(draw(st.sets(st.integers(0, experts - 1), min_size=1)))) for _ in range(layers))


# Stage 1 -------------------------------------------------------------------------------------------------------------


@given(activations(), st.integers(0, 12))
def test_the_search_finds_the_best_of_all_subsets(p: Activation, extra: int) -> None:
    layers, experts = len(p), len(p[0])
    most = layers + extra
    found = initial_sets(p, most)
    best = max(threshold(p, each) for each in all_sets(layers, experts) if count(each) <= most)
    assert threshold(p, found) == best
    assert count(found) <= most
    assert all(found)


@given(activations(), st.integers(0, 11))
def test_theta_and_every_set_grow_with_the_budget(p: Activation, extra: int) -> None:
    less, more = (initial_sets(p, len(p) + extra + one) for one in (0, 1))
    assert threshold(p, less) <= threshold(p, more)
    assert all(set(a) <= set(b) for a, b in zip(less, more, strict=True))


@given(activations())
def test_who_can_hold_everything_does(p: Activation) -> None:
    assert initial_sets(p, len(p) * len(p[0])) == (tuple(range(len(p[0]))),) * len(p)


def test_equally_active_experts_are_kept_by_lower_id() -> None:
    assert initial_sets(((0.25, 0.25, 0.25, 0.25),), 2) == ((0, 1),)
    assert initial_sets(((0.1, 0.4, 0.1, 0.4), (0.0, 0.0, 0.5, 0.5)), 4) == ((1, 3), (2, 3))


def test_the_example_of_the_specification() -> None:
    python = (0.10, 0.00, 0.11, 0.29, 0.06, 0.13, 0.02, 0.28)  # 99 % by rounding
    assert initial_sets((python,), 4) == ((2, 3, 5, 7),)


@given(st.lists(st.permutations([0.0, 0.125, 0.25, 0.625]), min_size=3, max_size=3), st.permutations(range(4)))
def test_permuted_experts_permute_the_sets(p: list[list[float]], order: list[int]) -> None:
    permuted = tuple(tuple(row[old] for old in order) for row in p)
    for most in range(3, 13):
        want = [{order.index(m) for m in ids} for ids in initial_sets(tuple(map(tuple, p)), most)]
        assert [set(ids) for ids in initial_sets(permuted, most)] == want


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.floats(0, 1e8))
def test_what_fits_stays_within_the_memory(dense: int, expert: int, memory: float) -> None:
    most = experts_that_fit(memory, dense, expert)
    assert dense + most * expert <= memory * (1 + 1e-12)
    assert dense + (most + 1) * expert > memory * (1 - 1e-12)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 30), st.integers(0, 99))
def test_random_sets_are_as_many_as_allowed_and_spread_over_the_layers(
    layers: int, experts: int, more: int, seed: int
) -> None:
    most = layers - 1 + more
    drawn = random_sets(layers, experts, most, np.random.default_rng(seed))
    assert count(drawn) == min(most, layers * experts)
    sizes = [len(set(ids)) for ids in drawn]
    assert max(sizes) - min(sizes) <= 1


def test_any_layer_may_get_what_is_left_of_random_sets() -> None:
    drawn = [random_sets(3, 8, 13, np.random.default_rng(seed)) for seed in range(40)]
    assert {tuple(map(len, sets)) for sets in drawn} == {(5, 4, 4), (4, 5, 4), (4, 4, 5)}


def test_random_sets_differ_and_are_of_experts_that_there_are() -> None:
    drawn = random_sets(3, 8, 12, np.random.default_rng(1))
    assert all(list(ids) == sorted(ids) and set(ids) <= set(range(8)) for ids in drawn)
    assert len(set(drawn)) > 1
    assert random_sets(2, 3, 99, np.random.default_rng(1)) == ((0, 1, 2),) * 2


# Who is like whom ----------------------------------------------------------------------------------------------------


@given(activations(2, 3), activations(2, 3), st.floats(0.01, 100))
def test_similarity_is_symmetric_one_with_itself_and_knows_no_scale(p: Activation, a: Activation, times: float) -> None:
    assert similarity(p, a) == pytest.approx(similarity(a, p))
    assert similarity(p, p) == pytest.approx(1)
    scaled = tuple(tuple(times * x for x in row) for row in a)
    assert similarity(p, scaled) == pytest.approx(similarity(p, a))
    flat, other = ([x for row in table for x in row] for table in (p, a))
    cosine = sum(x * y for x, y in zip(flat, other, strict=True)) / math.hypot(*flat) / math.hypot(*other)
    assert similarity(p, a) == pytest.approx(cosine)


@given(st.lists(activations(2, 3), min_size=1, max_size=4), st.data())
def test_what_neighbours_want_is_a_convex_combination(found: list[Activation], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0, 1), min_size=len(found), max_size=len(found)))
    table = np.array(pooled(found, weights))
    assert (table >= np.min(found, axis=0) - 1e-12).all()
    assert (table <= np.max(found, axis=0) + 1e-12).all()
    np.testing.assert_allclose(table.sum(axis=1), 1)


def test_where_all_are_alike_the_lowest_ids_are_the_neighbours() -> None:
    p = ((0.3, 0.7), (0.1, 0.9))
    assert most_similar(2, dict.fromkeys((4, 2, 0, 3), p), 2) == [(0, 1.0), (3, 1.0)]
    np.testing.assert_allclose(pooled([p, p], [1.0, 1.0]), p)


def test_the_mean_of_a_domain_is_weighted() -> None:
    np.testing.assert_allclose(mean_activation([((1.0, 0.0),), ((0.0, 1.0),)], [3, 1]), [[0.75, 0.25]])


# Changes -------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_so_many_experts_are_added_or_given_up(data: st.DataObject) -> None:
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    held, wanted = data.draw(sets(layers, experts)), data.draw(activations(layers, experts))
    change, room = data.draw(st.integers(-14, 14)), data.draw(st.integers(0, 12))
    size = count(held)
    found = recommended(held, change, wanted, size + room)
    if change > 0:
        assert count(found) - size == min(change, layers * experts - size, room)
        assert all(set(old) <= set(new) for old, new in zip(held, found, strict=True))
    else:
        assert size - count(found) == min(-change, size - layers)
        assert all(set(new) <= set(old) and new for old, new in zip(held, found, strict=True))


def test_the_most_and_the_least_wanted_over_all_layers() -> None:
    wanted = ((0.6, 0.1, 0.3), (0.2, 0.2, 0.6))
    assert recommended(((1,), (0,)), 2, wanted, 9) == ((0, 1), (0, 2))
    assert recommended(((1,), (0,)), 4, wanted, 5) == ((0, 1, 2), (0, 2))
    assert recommended(((0, 1, 2), (0, 1, 2)), -1, wanted, 9) == ((0, 2), (0, 1, 2))
    assert recommended(((0, 1, 2), (0, 1, 2)), -2, wanted, 9) == ((0, 2), (0, 2))  # of equals the lower id stays
    assert recommended(((0, 1), (0,)), 1, wanted, 2) == ((0, 1), (0,))  # no room


# The state machine ---------------------------------------------------------------------------------------------------

A, B, C = ((0, 1),), ((0, 1, 2),), ((0,),)
P: Activation = ((0.5, 0.5, 0.0),)


def after(structure: Structure, *scores: float, patience: int = 2) -> Structure:
    for score in scores:
        structure = observed(structure, score, P, patience)
    return structure


def test_a_better_score_changes_nothing_but_the_best() -> None:
    assert after(Structure(A, 3), 2.0, 1.5) == Structure(A, 3, P, 1.5)


def test_a_trial_that_fails_goes_back_and_is_the_last() -> None:
    tried = advised(after(Structure(A, 3), 2.0, 2.0, 2.5), B)
    assert (tried.held, tried.before, tried.waits) == (B, A, 0)
    assert after(tried, 2.0).held == B
    back = after(tried, 2.0, 2.1)
    assert (back.held, back.before, back.fixed) == (A, None, True)


def test_a_trial_that_helps_stays_and_may_be_followed_by_another() -> None:
    kept = after(advised(after(Structure(A, 3), 2.0, 2.0, 2.0), B), 2.1, 1.9)
    assert (kept.held, kept.before, kept.fixed, kept.best) == (B, None, False, 1.9)
    again = next_round({0: after(kept, 2.0), 1: Structure(C, 3, P)}, {0: (2.0, P)})[0]
    assert (again.held, again.before) == (C, B)  # the neighbour holds one expert


def next_round(
    structures: dict[int, Structure], reports: dict[int, tuple[float, Activation]], recommend: bool = True
) -> dict[int, Structure]:
    return next_structures(structures, reports, patience=2, neighbours=1, recommend=recommend)


def test_who_waited_long_enough_gets_what_the_nearest_hold_on_average() -> None:
    waiting, other = Structure(A, 3, P, 1.0, waits=1), Structure(B, 3, ((0.4, 0.4, 0.2),))
    found = next_round({0: waiting, 1: other}, {0: (1.0, P)})
    assert (found[0].held, found[0].before, found[0].waits) == (B, A, 0)
    assert found[1] == other
    full = next_round({0: replace(waiting, most=2), 1: other}, {0: (1.0, P)})
    assert (full[0].held, full[0].before) == (A, None)
    without = next_round({0: waiting, 1: other}, {0: (1.0, P)}, recommend=False)
    assert (without[0].held, without[0].waits) == (A, 2)


def test_advice_looks_at_the_sets_before_any_advice_of_the_round() -> None:
    one, two = Structure(A, 3, P, 1.0, waits=1), Structure(B, 3, P, 1.0, waits=1)
    found = next_round({0: one, 1: two}, {0: (1.0, P), 1: (1.0, P)})
    assert (found[0].held, found[1].held) == (B, A)


def test_no_other_client_no_advice() -> None:
    alone = Structure(A, 3, P, 1.0, waits=1)
    assert next_round({0: alone, 1: Structure(B, 3)}, {0: (1.0, P)})[0].held == A


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), max_size=40), st.integers(1, 3))
def test_a_fixed_client_never_changes_and_an_improved_one_does_not(rounds: list[tuple[float, float]], k: int) -> None:
    structures = {0: Structure(A, 3, P), 1: Structure(B, 3, ((0.3, 0.4, 0.3),))}
    for scores in rounds:
        reports = {client: (score, structures[client].activation or P) for client, score in enumerate(scores)}
        now = next_structures(structures, reports, k, 2, recommend=True)
        for client, (score, _) in reports.items():
            old, new = structures[client], now[client]
            improved = old.best is None or score < old.best
            if old.fixed or improved:
                assert new.held == old.held
            assert old.fixed <= new.fixed
            assert new.best == (score if improved else old.best)
            if new.fixed and not old.fixed:
                assert new.held == old.before
        structures = now


def test_a_half_is_rounded_to_even() -> None:
    waiting = Structure(((0,),), 3, P, 1.0, waits=1)
    others = {1: Structure(((0,),), 3, P), 2: Structure(A, 3, P)}  # 1.5 on average
    found = next_structures({0: waiting, **others}, {0: (1.0, P)}, 2, 2, recommend=True)
    assert found[0].held == ((0, 1),)


@given(activations(2, 3), st.floats(0, 10), st.booleans())
def test_json_and_back_is_the_same(p: Activation, best: float, fixed: bool) -> None:
    structure = Structure(((0, 2), (1,)), 5, p, best, 3, ((0,), (1,)), fixed)
    for each in (structure, Structure(A, 1)):
        assert Structure.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_what_is_no_structure_is_refused() -> None:
    with pytest.raises(ValidationError):
        Structure.from_json({"held": [["x"]], "most": 1})
