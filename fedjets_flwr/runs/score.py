"""What a method is judged by: which number of an evaluated round, and which way is better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Score:
    """A number of a round's record by which the best checkpoint is known, and that plots and reports show.

    Attributes:
        name: as people read it.
        better: which way is better.
        path: where a round's record holds it.
    """

    name: str
    better: Literal["higher", "lower"]
    path: tuple[str, ...]

    def of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a round's record says of it; nothing if the round did not measure it."""
        value: Any = record
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return {} if value is None else {"score": {"name": self.name, "better": self.better, "value": value}}


UNSEEN_ACCURACY = Score("accuracy on unseen clients", "higher", ("evaluation", "accuracy"))
VALIDATION_ACCURACY = Score("accuracy on validation clients", "higher", ("validation", "accuracy"))
PARTICIPANTS_ACCURACY = Score("accuracy on clients' own tests", "higher", ("participants", "local"))
BITS_PER_BYTE = Score("bits per byte on clients' own tests", "lower", ("participants", "bits_per_byte"))


ACCURACIES = (UNSEEN_ACCURACY.name, VALIDATION_ACCURACY.name)
"""Scores that every picture of accuracies shows."""

COURSES = {"validation": "validation clients", "evaluation": "unseen clients"}
"""Who is scored in a round's record, for people: where some clients are there to choose by, others are scored once."""


def course(records: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """Return the key of :data:`COURSES` by which records show how a run went, and those of them that hold it."""
    found = {kind: [record for record in records if kind in record] for kind in COURSES}
    return next(((kind, held) for kind, held in found.items() if held), ("evaluation", []))


def improves(score: Mapping[str, Any], best: float | None) -> bool:
    """Return whether a record's score beats the best so far, None at first."""
    value: float = score["value"]
    return best is None or (value > best if score["better"] == "higher" else value < best)


def best_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the last score of some records beside the best and its round; None without one."""
    scored = [(record["round"], record["score"]) for record in records if "score" in record]
    if not scored:
        return None
    best_round, best = scored[0]
    for server_round, score in scored[1:]:
        if improves(score, best["value"]):
            best_round, best = server_round, score
    last: dict[str, Any] = dict(scored[-1][1])
    return last | {"best": best["value"], "best_round": best_round}
