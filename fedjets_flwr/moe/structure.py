"""Which experts a client holds (FedMoE, arXiv 2408.11304): its first sets, whom it is like, and how sets change.

Pure functions of numbers. An activation p is, for each of L layers, the share of a client's validation tokens that went
to each of E experts: a row sums to 1 over the experts that the client holds and is 0 elsewhere. Scores are better when
lower (bits per byte). Memory is in bytes, for a model with all that its training keeps of each weight.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fedjets_flwr.models.transformer import Sets, members

Activation = tuple[tuple[float, ...], ...]
"""(L, E)."""


def count(sets: Sets) -> int:
    """Return |X|, the experts over all layers."""
    return sum(map(len, sets))


# Stage 1 -------------------------------------------------------------------------------------------------------------


def experts_that_fit(memory: float, dense: float, expert: float) -> int:
    """Return how many experts fit in a memory beside what all clients share; below 0 if not even that does."""
    return math.floor((memory - dense) / expert)


def threshold(activation: Activation, sets: Sets) -> float:
    """Return theta: the least share of tokens, over the layers, that goes to the experts held."""
    return min(math.fsum(row[m] for m in ids) for row, ids in zip(activation, sets, strict=True))


def initial_sets(activation: Activation, most: int) -> Sets:
    """Return the sets of at most ``most`` experts over all layers with the largest theta, and as few as reach it.

    Experts are of one size, so that the only thetas that matter are the sums of the k most active experts of a layer;
    the search bisects over those, and what it finds is the optimum. Who can hold all experts does. Equals: lower ids.

    Args:
        activation: (L, E).
        most: at least L.
    """
    layers, experts = len(activation), len(activation[0])
    if most >= layers * experts:
        return (tuple(range(experts)),) * layers
    orders = [sorted(range(experts), key=lambda m, row=row: (-row[m], m)) for row in activation]  # type: ignore[misc]
    # fsum rounds once, so a longer prefix is never less.
    sums = [
        [math.fsum(row[m] for m in order[: k + 1]) for k in range(experts)]
        for row, order in zip(activation, orders, strict=True)
    ]
    reachable = min(row[-1] for row in sums)
    thetas = sorted({theta for row in sums for theta in row if theta <= reachable})

    def needed(theta: float) -> list[int]:
        return [next(k for k, total in enumerate(row, start=1) if total >= theta) for row in sums]

    # The first one needs one expert a layer; what a theta needs never falls.
    best = bisect_right(thetas, most, key=lambda theta: sum(needed(theta))) - 1
    return tuple(tuple(sorted(order[:k])) for order, k in zip(orders, needed(thetas[best]), strict=True))


def random_sets(layers: int, experts: int, most: int, generator: np.random.Generator) -> Sets:
    """Return ``most`` experts over all layers, drawn uniformly: as many in each, and one more in some, drawn too."""
    each, left = divmod(min(most, layers * experts), layers)
    larger = set(generator.choice(layers, left, replace=False).tolist()) if left else set()
    sizes = [each + (layer in larger) for layer in range(layers)]
    return tuple(tuple(sorted(generator.choice(experts, size, replace=False).tolist())) for size in sizes)


def random_sets_like(sets: Sets, experts: int, generator: np.random.Generator) -> Sets:
    """Return sets of the same sizes, drawn uniformly."""
    return tuple(tuple(sorted(generator.choice(experts, len(ids), replace=False).tolist())) for ids in sets)


def mean_activation(activations: Sequence[Activation], weights: Sequence[float]) -> Activation:
    """Return the weighted mean of activations."""
    total = sum(weights)
    mean = sum(np.array(p) * (weight / total) for p, weight in zip(activations, weights, strict=True))
    return as_activation(np.asarray(mean))


def as_activation(table: np.ndarray) -> Activation:
    """Return a table (L, E) as tuples of floats."""
    return tuple(map(tuple, table.astype(float).tolist()))


# Stage 2 -------------------------------------------------------------------------------------------------------------


def similarity(p: Activation, other: Activation) -> float:
    """Return the cosine of two activations, flattened over the layers."""
    a, b = np.array(p).ravel(), np.array(other).ravel()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def most_similar(client: int, activations: Mapping[int, Activation], neighbours: int) -> list[tuple[int, float]]:
    """Return the other clients most like one, with their similarities; equals by lower id.

    Args:
        client: whose activation is among ``activations``.
        activations: by client id.
        neighbours: K.
    """
    own = activations[client]
    # Equal activations must count as equal, whatever the last bit of a cosine.
    found = [(other, round(similarity(own, p), 12)) for other, p in activations.items() if other != client]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:neighbours]


def pooled(activations: Sequence[Activation], similarities: Sequence[float]) -> Activation:
    """Return phat, the mean of activations weighted by similarity; by nothing where nobody is similar."""
    return mean_activation(activations, similarities if sum(similarities) > 0 else [1.0] * len(activations))


def recommended(held: Sets, change: int, wanted: Activation, most: int) -> Sets:
    """Return sets with ``change`` experts more, those wanted most, or fewer, those wanted least.

    Args:
        held: the sets as they are.
        change: n; below 0: experts to give up. Every layer keeps one.
        wanted: phat, (L, E).
        most: experts over all layers that the client's memory allows.
    """
    now = set(members(held))
    ranking = sorted(
        ((layer, m) for layer, row in enumerate(wanted) for m in range(len(row))),
        key=lambda at: (-wanted[at[0]][at[1]], at),
    )
    if change > 0:
        absent = [at for at in ranking if at not in now]
        now.update(absent[: max(0, min(change, most - len(now)))])
    else:
        left, sizes = -change, [len(ids) for ids in held]
        for at in reversed(ranking):
            if left and at in now and sizes[at[0]] > 1:
                now.remove(at)
                sizes[at[0]] -= 1
                left -= 1
    return tuple(tuple(sorted(m for layer, m in now if layer == number)) for number in range(len(held)))


@dataclass(frozen=True)
class Structure:
    """One client's sets, and what decides whether they change; it converts to and from JSON.

    Attributes:
        held: X, the experts it holds.
        most: experts that its memory allows.
        activation: its newest p; none before it is known.
        best: its lowest score so far; none before the first.
        waits: its own participations since that, or since its sets last changed.
        before: the sets before a trial, to which it goes back where the trial does not help; none: no trial.
        fixed: whether its sets never change again.
    """

    held: Sets
    most: int
    activation: Activation | None = None
    best: float | None = None
    waits: int = 0
    before: Sets | None = None
    fixed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold, number for number."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Structure":
        """Return the structure that :meth:`to_json` told.

        Raises:
            pydantic.ValidationError: it is none.
        """
        return _STRUCTURE.validate_python(value)


_STRUCTURE = TypeAdapter(Structure)


def observed(structure: Structure, score: float, activation: Activation, patience: int) -> Structure:
    """Return a structure after its client took part: a better score ends a trial well, too many others end it badly."""
    now = replace(structure, activation=activation)
    if structure.best is None or score < structure.best:
        return replace(now, best=score, waits=0, before=None)
    now = replace(now, waits=structure.waits + 1)
    if now.before is not None and now.waits >= patience:
        return replace(now, held=now.before, before=None, waits=0, fixed=True)
    return now


def waiting(structure: Structure, patience: int) -> bool:
    """Return whether a client is to be recommended other sets."""
    return not structure.fixed and structure.before is None and structure.waits >= patience


def advised(structure: Structure, wanted: Sets) -> Structure:
    """Return a structure on trial with other sets; where they are the same, as it was."""
    return structure if wanted == structure.held else replace(structure, held=wanted, before=structure.held, waits=0)


def next_structures(
    structures: Mapping[int, Structure],
    reports: Mapping[int, tuple[float, Activation]],
    patience: int,
    neighbours: int,
    recommend: bool,
) -> dict[int, Structure]:
    """Return all clients' structures after a round; every recommendation looks at the same ones.

    Args:
        structures: by client id.
        reports: (score, activation) of the clients that took part.
        patience: participations without a better score, for a recommendation and for a trial alike.
        neighbours: K.
        recommend: whether sets change at all.
    """
    after = dict(structures)
    after |= {k: observed(structures[k], score, p, patience) for k, (score, p) in reports.items()}
    if not recommend:
        return after
    known = {k: s.activation for k, s in after.items() if s.activation is not None}
    advice = {
        k: sets
        for k in reports
        if waiting(after[k], patience) and (sets := advice_for(k, after, known, neighbours)) is not None
    }
    return after | {k: advised(after[k], sets) for k, sets in advice.items()}


def advice_for(
    client: int, structures: Mapping[int, Structure], known: Mapping[int, Activation], neighbours: int
) -> Sets | None:
    """Return the sets that clients like one make of its own; None where there is no other."""
    similar = most_similar(client, known, neighbours)
    if not similar:
        return None
    own, others = structures[client], [other for other, _ in similar]
    mean = sum(count(structures[other].held) for other in others) / len(others)
    wanted = pooled([known[other] for other in others], [value for _, value in similar])
    return recommended(own.held, round(mean) - count(own.held), wanted, own.most)
