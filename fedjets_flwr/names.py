"""Full names of the vectors that travel and are kept: ``expert.3``, ``gate``, ``variate.7``."""

from collections.abc import Iterable


def expert_name(expert: int) -> str:
    """Return the name of an expert's vector."""
    return f"expert.{expert}"


def expert_id(name: str) -> int:
    """Return which expert a name of :func:`expert_name` means."""
    return int(name.removeprefix("expert."))


def expert_ids(names: Iterable[str]) -> tuple[int, ...]:
    """Return the ids of the experts among names of vectors."""
    return tuple(expert_id(name) for name in names if name.startswith("expert."))
