"""Rounds to a share of a gain: closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.compare.gain import rounds_to

COURSE = [(2, 2.9), (4, 2.3), (6, 2.1), (8, 2.25), (10, 2.0)]


@pytest.mark.parametrize(
    ("share", "rounds"), [(0.0, 2), (0.1, 2), (0.11, 4), (0.7, 4), (0.71, 6), (0.9, 6), (0.91, 10), (1.0, 10)]
)
def test_the_first_scored_round_that_gets_there(share: float, rounds: int) -> None:
    assert rounds_to(share, COURSE, 3.0, 2.0) == rounds


def test_who_does_not_get_there_has_no_rounds() -> None:
    assert rounds_to(0.9, COURSE, 3.0, 1.0) is None
    assert rounds_to(0.9, [], 3.0, 2.0) is None


@pytest.mark.parametrize("after", [3.0, 3.5])
def test_where_nothing_is_gained_there_is_nothing_to_reach(after: float) -> None:
    assert rounds_to(0.9, [(1, 0.0)], 3.0, after) is None


@given(st.lists(st.floats(0, 4), min_size=1, max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_never_takes_fewer_rounds(scores: list[float], a: float, b: float) -> None:
    course = list(enumerate(scores, start=1))
    fewer, more = (rounds_to(share, course, 3.0, 1.0) for share in sorted((a, b)))
    assert more is None or (fewer is not None and fewer <= more)
