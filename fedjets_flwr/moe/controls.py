"""What a client could have for nothing: the common expert, and what unlabelled samples make of it.

The claim of a method is how far it is above the best of these.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from fedjets_flwr.moe.label_prior import em_prior, group_prior, with_prior
from fedjets_flwr.moe.metrics import PRIORS, STATISTICS, right_predictions

TEMPERED, GROUPS = "tempered", "groups"
"""Corrections of the common expert alone: EM once its confidence is that of held-out samples; a mask of whole groups of
classes, which knows how this project's ``label-groups`` split was made."""

_WORDS = {
    "em": "EM", "support": "EM's support", "map": "MAP-EM", "masked": "classes known", "own": "AdaBN",
    TEMPERED: "tempered EM", GROUPS: "likeliest groups",
}  # fmt: skip


def _named(prior: str, statistics: str) -> tuple[str, str]:
    parts = [*(["own"] if statistics == "own" else []), *([prior] if prior != "none" else [])]
    key = "_".join(["common_expert", *("adabn" if part == "own" else part for part in parts)])
    return key, " + ".join(["common expert", *(_WORDS[part] for part in parts)])


CONTROLS: Mapping[str, str] = dict(
    _named(prior, statistics) for statistics in STATISTICS for prior in (*PRIORS, TEMPERED, GROUPS)
)
"""Names for people by key, in the order in which a client reports its right predictions."""

FREE = tuple(name for name in CONTROLS if not name.endswith("masked"))
"""The controls that read no label."""


def right_by_control(
    answers: Sequence[Tensor], labels: Tensor, temperature: float, groups: Sequence[Collection[int]], held: int
) -> list[int]:
    """Return how many samples each of :data:`CONTROLS` gets right.

    Args:
        answers: the common expert's logits (n, C) by :data:`metrics.STATISTICS`.
        labels: (n,), for scoring.
        temperature: by which its logits are divided for tempered EM.
        groups: of classes, of which a client holds ``held`` whole ones; none: unknown, and the mask changes nothing.
        held: how many.
    """
    counts = []
    for logits in answers:
        probs, tempered = logits.softmax(1), (logits.double() / temperature).softmax(1)
        corrected = [with_prior(tempered, em_prior(tempered)), with_prior(probs, group_prior(probs, groups, held))]
        counts += right_predictions(probs, labels) + [int((p.argmax(1) == labels).sum()) for p in corrected]
    return counts


def measured(temperature: float, groups: Collection[object]) -> list[str]:
    """Return the keys of the controls that differ from others: not all common experts and splits give all of them."""
    left_out = ([TEMPERED] if temperature == 1 else []) + ([] if groups else [GROUPS])
    return [key for key in CONTROLS if not key.endswith(tuple(left_out))]


def best_control(controls: Mapping[str, float | None]) -> str:
    """Return the name of the best of the controls that read no label; results of older versions know fewer."""
    return _best(controls, FREE)


def best_bound(controls: Mapping[str, float | None]) -> str:
    """Return the name of the best of the controls that are told which classes there are."""
    return _best(controls, [name for name in CONTROLS if name not in FREE])


def _best(controls: Mapping[str, float | None], names: Sequence[str]) -> str:
    found = {name: value for name in names if (value := controls.get(name)) is not None}
    return max(found, key=found.__getitem__, default=names[0])


def shown(controls: Mapping[str, float | None]) -> list[str]:
    """Return the keys that are worth a line: the common expert, EM, the best that is free, the bound."""
    keys = dict.fromkeys(("common_expert", "common_expert_em", best_control(controls), best_bound(controls)))
    return [key for key in keys if controls.get(key) is not None]


def mean_controls(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over runs of every control that all of them measured."""
    return {key: sum(run[key] for run in runs) / len(runs) for key in CONTROLS if all(key in run for run in runs)}
