"""Names that travel and are kept: of vectors, ``expert.3``, ``gate``, ``variate.7``, and of the roles of clients."""

from collections.abc import Iterable

TRAIN, UNSEEN, VALIDATION = ROLES = ("train", "unseen", "validation")
"""Clients that train; that never train and score a method; that never train and by whose scores settings are chosen.
Their ids follow each other in this order."""


def expert_name(expert: int) -> str:
    """Return the name of an expert's vector."""
    return f"expert.{expert}"


def expert_id(name: str) -> int:
    """Return which expert a name of :func:`expert_name` means."""
    return int(name.removeprefix("expert."))


def expert_ids(names: Iterable[str]) -> tuple[int, ...]:
    """Return the ids of the experts among names of vectors."""
    return tuple(expert_id(name) for name in names if name.startswith("expert."))
