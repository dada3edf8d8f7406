"""Names that travel and are kept: of vectors, ``expert.3``, ``gate``, ``variate.7``, and of the roles of clients.

Experts inside the layers of one model are ``expert.1.3``, and what all such models share is ``dense``.
"""

import re
from collections.abc import Iterable
from typing import Literal

TRAIN, UNSEEN, VALIDATION = ROLES = ("train", "unseen", "validation")
"""Clients that train; that never train and score a method; that never train and by whose scores settings are chosen.
Their ids follow each other in this order."""

SHARED_OF = {"shared": "train", "shared-val": "val"}
"""What of a training client's samples takes part in rounds, and of which part it is."""

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
"""Of a training client's samples: what it trains on, chooses by, and is scored on."""

DENSE = "dense"
_EXPERT = re.compile(r"expert\.(\d+)(\.\d+)?")


def expert_name(expert: int) -> str:
    """Return the name of an expert's vector."""
    return f"expert.{expert}"


def switch_expert_name(layer: int, expert: int) -> str:
    """Return the name of the vector of an expert inside a model's layer."""
    return f"expert.{layer}.{expert}"


def choice_name(position: int) -> str:
    """Return the name under which an expert travels that a client chose itself, by its place in the choice."""
    return f"choice.{position}"


MICRO = 10**6
"""What a job's whole numbers that stand for fractions are told in."""


USUAL = ("usual.expert", "usual.common")
"""Numbers of a job: how sure the gate's first choice and the common expert usually are, in millionths of a nat."""


def is_choice(name: str) -> bool:
    """Return whether a name is one of :func:`choice_name`."""
    return name.startswith("choice.")


def expert_id(name: str) -> int:
    """Return which expert a name of :func:`expert_name` means."""
    return int(name.removeprefix("expert."))


def expert_ids(names: Iterable[str]) -> tuple[int, ...]:
    """Return the ids of the experts that are whole models among names of vectors.

    Raises:
        ValueError: a name begins like an expert's and is none's.
    """
    found = [_expert(name) for name in names if name.startswith("expert.")]
    return tuple(int(match[1]) for match in found if not match[2])


def _expert(name: str) -> re.Match[str]:
    if (match := _EXPERT.fullmatch(name)) is None:
        raise ValueError(f"{name}: the name of no expert")
    return match
