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
PARTICIPANTS_ACCURACY = Score("accuracy on clients' own tests", "higher", ("participants", "local"))


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
