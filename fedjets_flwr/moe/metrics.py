"""What an evaluation counts at a client, and what the server makes of the counts: pure functions.

Labels are used for scoring only. Counts are integers, so sums over clients do not depend on their order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedjets_flwr.moe.gating import READ_OUTS, top_1_of
from fedjets_flwr.moe.label_prior import ESTIMATES, estimates, present_classes, with_prior

PRIORS = ("none", *ESTIMATES, "masked")
"""How a read-out is corrected: not at all, by class shares that are estimated on the unlabelled data, by knowing the
classes (an upper bound)."""

STATISTICS = ("trained", "own")
"""Whose batch-norm statistics a model has: those it was trained to, or the client's own (AdaBN)."""

READINGS = tuple(
    f"{read_out}/{prior}{'/adabn' if own == 'own' else ''}"
    for own in STATISTICS
    for read_out in READ_OUTS
    for prior in PRIORS
)
"""Every read-out with every correction, in the order in which a client reports its right predictions."""


class Reading(NamedTuple):
    """The parts of an entry of :data:`READINGS`."""

    read_out: str
    prior: str
    statistics: str

    @classmethod
    def of(cls, name: str) -> "Reading":
        """Return a reading's parts."""
        read_out, prior, *own = name.split("/")
        return cls(read_out, prior, STATISTICS[len(own)])


def readings(probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return class probabilities (n, C) corrected in each way of :data:`PRIORS`."""
    estimated = {name: with_prior(probs, shares) for name, shares in estimates(probs).items()}
    return {"none": probs, **estimated, "masked": with_prior(probs, present_classes(labels, probs.shape[1]))}


def right_predictions(probs: Tensor, labels: Tensor) -> list[int]:
    """Return how many samples each of :data:`PRIORS` gets right."""
    return [int((corrected.argmax(1) == labels).sum()) for corrected in readings(probs, labels).values()]


def count_predictions(
    answers: Sequence[tuple[Tensor, Tensor]],
    common: Tensor,
    keep: bool,
    experts: Sequence[int],
    labels: Tensor,
    columns: Tensor,
    num_columns: int,
) -> dict[str, list[int]]:
    """Return a client's counts.

    Args:
        answers: probabilities (K, n, C) of the K experts and their weights (n, K); where the experts have batch norm,
            the same once more with the client's own statistics.
        common: the common expert's probabilities, (n, C).
        keep: whether the samples are more familiar to the common expert.
        experts: their ids.
        labels: (n,), for scoring.
        columns: what experts may specialise in, (n,): the classes or the domains of the samples.
        num_columns: how many there are.

    Returns:
        ``right``: right predictions by :data:`READINGS`; ``answered``: samples by (position among the K, column), flat;
        ``answered-right``: the right ones among them; ``classes``: samples by column.
    """
    right = [_right_by_read_out(probs, weights, common, keep, labels) for probs, weights in answers]
    probs, weights = answers[0]
    best = top_1_of(weights)
    cells = best * num_columns + columns
    hit = READ_OUTS["top-1"](probs, weights, common, keep).argmax(1) == labels
    size = len(experts) * num_columns
    return {
        "right": [*right[0], *right[-1]],
        "answered": torch.bincount(cells, minlength=size).tolist(),
        "answered-right": torch.bincount(cells[hit], minlength=size).tolist(),
        "classes": torch.bincount(columns, minlength=num_columns).tolist(),
    }


def _right_by_read_out(probs: Tensor, weights: Tensor, common: Tensor, keep: bool, labels: Tensor) -> list[int]:
    """Return how many samples every read-out gets right with each of :data:`PRIORS`; one expert makes some the same."""
    found: list[tuple[Tensor, list[int]]] = []
    for read in READ_OUTS.values():
        mixed = read(probs, weights, common, keep)
        same = next((counts for other, counts in found if torch.equal(other, mixed)), None)
        found.append((mixed, same or right_predictions(mixed, labels)))
    return [count for _, counts in found for count in counts]


def count_inspection(probs: Tensor, labels: Tensor, columns: Tensor, num_columns: int) -> list[int]:
    """Return right predictions by (expert, column), flat, of all M experts' probabilities (M, n, C)."""
    hits = probs.argmax(dim=2) == labels
    return torch.stack([torch.bincount(columns[hit], minlength=num_columns) for hit in hits]).flatten().tolist()


@dataclass(frozen=True)
class ClientResult:
    """The counts of one unseen client (see :func:`count_predictions`).

    ``experts`` are those it received; ``kept_common``: whether its samples are more familiar to the common
    expert than to the first of them, None if it was not asked to compare.
    """

    experts: tuple[int, ...]
    samples: int
    right: Sequence[int]
    answered: Tensor
    answered_right: Tensor
    classes: Tensor
    gate_entropy: float
    kept_common: bool | None


def summarise(results: Mapping[int, ClientResult], reading: str, num_experts: int, gated: bool) -> dict[str, object]:
    """Return the evaluation over unseen clients: means over clients, as the paper's Table 1.

    ``gated``: whether a gate chose among the experts; only a gate can collapse to one.
    """
    position = READINGS.index(reading)
    per_client = {client: r.right[position] / r.samples for client, r in results.items()}
    compared = all(r.kept_common is not None for r in results.values())
    measured = compared or Reading.of(reading).read_out == "familiar"  # also if no anchor told anything
    means = {
        name: sum(r.right[i] / r.samples for r in results.values()) / len(results)
        for i, name in enumerate(READINGS)
        if measured or Reading.of(name).read_out != "familiar"
    }
    load = torch.zeros(num_experts)
    for r in results.values():
        load[list(r.experts)] += r.answered.sum(dim=1) / r.samples / len(results)
    return {
        "accuracy": means[reading],
        "reading": reading,
        "per_client_accuracy": per_client,
        "readings": means,
        "expert_load": load.tolist(),
        "gate_entropy": sum(r.gate_entropy for r in results.values()) / len(results),
        "chosen": {client: list(r.experts) for client, r in results.items()},
        "collapsed": gated and num_experts > 1 and float(load.max()) > 0.95,
        **({"kept_common": [client for client, r in results.items() if r.kept_common]} if compared else {}),
    }


def routing(results: Mapping[int, ClientResult], expert_class_accuracy: Tensor) -> dict[str, float]:
    """Return how well the gate routes, by the accuracy of experts on classes or domains, (M, columns), maybe NaN.

    Returns:
        ``sample_share``: share of unseen samples answered by the expert that is most accurate on their column;
        ``coverage``: mean share of a client's samples whose best expert is among its K.
    """
    best = expert_class_accuracy.nan_to_num(-1.0).argmax(dim=0)
    hits, total, coverage = 0, 0, 0.0
    for r in results.values():
        held = torch.tensor(r.experts)
        hits += int((r.answered * (held[:, None] == best[None, :])).sum())
        total += r.samples
        covered = torch.isin(best, held)
        coverage += float(r.classes[covered].sum()) / r.samples / len(results)
    return {"sample_share": hits / total, "coverage": coverage}
