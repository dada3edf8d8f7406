"""Whom to wait for less often."""

from collections.abc import Hashable
from typing import Generic, TypeVar

Who = TypeVar("Who", bound=Hashable)


class Backoff(Generic[Who]):
    """Who stayed silent is left alone for 1, 2, 4, .. turns, until it answers in time."""

    def __init__(self) -> None:
        self._silences: dict[Who, int] = {}
        self._until: dict[Who, int] = {}

    def silent(self, who: Who, turn: int) -> None:
        """Note that somebody did not answer in time."""
        self._silences[who] = self._silences.get(who, 0) + 1
        self._until[who] = turn + 2 ** (self._silences[who] - 1)

    def answered(self, who: Who) -> None:
        """Note that somebody did."""
        self._silences.pop(who, None)
        self._until.pop(who, None)

    def resting(self, who: Who, turn: int) -> bool:
        """Return whether it is left alone in a turn."""
        return turn <= self._until.get(who, turn - 1)
