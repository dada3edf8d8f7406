"""When an exchange has waited long enough."""

from fractions import Fraction
from math import ceil

from hypothesis import example, given
from hypothesis import strategies as st

from fedjets_flwr.wire.exchange import enough


@example(25, 28)
@given(st.integers(1, 10_000), st.integers(0, 100))
def test_enough_is_the_share_as_it_is_written(nodes: int, hundredths: int) -> None:
    """0.28 of 25 nodes are 7, though the product of the floats is a little more."""
    assert enough(hundredths / 100, nodes) == ceil(Fraction(hundredths, 100) * nodes)
