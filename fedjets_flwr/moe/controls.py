"""What a client could have for nothing: the common expert, and what unlabelled samples make of it.

The claim of a method is how far it is above the best of these.
"""

from collections.abc import Mapping, Sequence

from fedjets_flwr.moe.metrics import PRIORS, STATISTICS

_WORDS = {"em": "EM", "support": "EM's support", "map": "MAP-EM", "masked": "classes known", "own": "AdaBN"}


def _named(prior: str, statistics: str) -> tuple[str, str]:
    parts = [*(["own"] if statistics == "own" else []), *([prior] if prior != "none" else [])]
    key = "_".join(["common_expert", *("adabn" if part == "own" else part for part in parts)])
    return key, " + ".join(["common expert", *(_WORDS[part] for part in parts)])


CONTROLS: Mapping[str, str] = dict(_named(prior, statistics) for statistics in STATISTICS for prior in PRIORS)
"""Names for people by key, in the order in which a client reports its right predictions."""

FREE = tuple(name for name in CONTROLS if not name.endswith("masked"))
"""The controls that read no label."""


def best_control(controls: Mapping[str, float | None]) -> str:
    """Return the name of the best of the controls that read no label; results of older versions know fewer."""
    found = {name: value for name in FREE if (value := controls.get(name)) is not None}
    return max(found, key=found.__getitem__, default=FREE[0])


def shown(controls: Mapping[str, float | None]) -> list[str]:
    """Return the keys that are worth a line: the common expert, EM, the best that is free, the bound."""
    keys = dict.fromkeys(("common_expert", "common_expert_em", best_control(controls), "common_expert_masked"))
    return [key for key in keys if controls.get(key) is not None]


def mean_controls(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over runs of every control that all of them measured."""
    return {key: sum(run[key] for run in runs) / len(runs) for key in CONTROLS if all(key in run for run in runs)}
