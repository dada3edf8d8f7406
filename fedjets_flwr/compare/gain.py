"""How many rounds a method takes to what another one gains (FedMoE, arXiv 2408.11304, Figure 6)."""

from collections.abc import Sequence

SHARES = (0.9, 0.99)
"""Of the gain, that a comparison tells the rounds to."""


def rounds_to(share: float, course: Sequence[tuple[int, float]], before: float, after: float) -> int | None:
    """Return the first round that reaches a share of a gain, among those that were scored; None if none does.

    Args:
        share: of the gain, from 0 to 1.
        course: (round, score) in the order of the rounds; lower is better.
        before: the score where the gain begins.
        after: the score where it ends; no lower than ``before``: there is none to reach.
    """
    if after >= before:
        return None
    target = before - share * (before - after)
    return next((server_round for server_round, score in course if score <= target), None)
