"""What clients that are scored answer: read, checked and averaged for :mod:`server_app.scoring`, which asks them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedjets_flwr.federation.reply_checks import check_samples
from fedjets_flwr.moe.metrics import READINGS, ClientResult, routing
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.wire.messages import BadReply, Reply
from strategies.base import Strategy

MOST_BITS = 1e6
"""Bits per byte that no model needs: a run's means must stay numbers that people can read."""


def read_result(
    reply: Reply, experts: tuple[int, ...], samples: int, classes: int, most: int, compared: bool = False
) -> ClientResult:
    """Return the counts of an unseen client that was served ``experts`` and prepared with ``samples``.

    ``compared``: whether it was told how sure its experts usually are.

    Raises:
        BadReply: the counts do not add up.
    """
    check_samples(reply, samples, most)
    grid = (len(experts), classes)
    answered, answered_right = (
        torch.tensor(reply.integers(name, grid[0] * grid[1], samples)).view(grid)
        for name in ("answered", "answered-right")
    )
    held = torch.tensor(reply.integers("classes", classes, samples))
    if (
        not torch.equal(answered.sum(dim=0), held)
        or int(held.sum()) != samples
        or bool((answered_right > answered).any())
    ):
        raise BadReply("answered, answered-right and classes do not add up")
    right = reply.integers("right", len(READINGS), samples)
    if right[READINGS.index("top-1/none")] != int(answered_right.sum()):
        raise BadReply("right and answered-right do not add up")
    kept_common = bool(reply.count("kept-common", 1)) if compared else None
    entropy = reply.number("gate-entropy")
    if not -1e-6 <= entropy <= 1 + 1e-6:
        raise BadReply("gate-entropy: expected a number from 0 to 1")
    return ClientResult(
        experts=experts,
        samples=samples,
        right=right,
        answered=answered,
        answered_right=answered_right,
        classes=held,
        gate_entropy=entropy,
        kept_common=kept_common,
    )


def read_entropy(reply: Reply, classes: int) -> float:
    """Return how sure an anchor's expert is of its samples, in nats.

    Raises:
        BadReply: that is no mean entropy of answers about so many classes.
    """
    if not 0 <= (nats := reply.number("usual-entropy")) <= math.log(classes) + 1e-6:
        raise BadReply(f"usual-entropy: expected the entropy of {classes} classes")
    return nats


@dataclass(frozen=True)
class TextResult:
    """What a client told of its test texts.

    Attributes:
        bits: per byte.
        domain: position of theirs.
        scores: from 0 to 1, by name.
        tuned: bits per byte after more local training, if that was asked for.
    """

    bits: float
    domain: int
    scores: Mapping[str, float]
    tuned: float | None


@dataclass(frozen=True)
class OwnTest:
    """What a client that trains told of its own test part.

    Attributes:
        counts: (right, total) there (``local``) and on test images that all share (``global``, where it has them).
        shares: what the method tells of a client's model, from 0 to 1, by name.
        text: on text, what it told of that.
    """

    counts: Mapping[str, list[int]]
    shares: Mapping[str, float]
    text: TextResult | None


def read_own_test(reply: Reply, strategy: Strategy, tuned: bool) -> OwnTest:
    """Return what a client tells of its own test part; with ``tuned`` after more local training, too.

    Raises:
        BadReply: a number is missing or none that it can be.
    """
    names = ("local", *(["global"] if "global" in reply.numbers else []))
    most = strategy.config.limits.max_samples
    return OwnTest(
        counts={name: _right_of(reply, name, most) for name in names},
        shares={name: _share_of(reply, name) for name in strategy.tells},
        text=_text_of(reply, strategy.task, tuned) if strategy.task.tells else None,
    )


def of_own_tests(answers: Mapping[int, OwnTest], domains: Sequence[str]) -> dict[str, object]:
    """Return what a round's record says of clients' own tests: means over clients, and each client's counts.

    Args:
        answers: by client id; one at least.
        domains: names of the texts' domains.
    """
    counts = {client: answer.counts for client, answer in answers.items()}
    listed: dict[str, list[float]] = {"local": [], "global": []}
    for answer in answers.values():
        for name, (right, total) in answer.counts.items():
            listed[name].append(right / total)
        for name, share in answer.shares.items():
            listed.setdefault(name, []).append(share)
    means: dict[str, object] = {name: sum(values) / len(values) for name, values in listed.items() if values}
    texts = {client: answer.text for client, answer in answers.items() if answer.text is not None}
    if texts:
        means |= _of_texts(texts, counts, domains)
    if more := [text.tuned for text in texts.values() if text.tuned is not None]:
        means["tuned_bits_per_byte"] = sum(more) / len(more)
    return means | {"clients": counts}


def _of_texts(
    texts: Mapping[int, TextResult], counts: Mapping[int, Mapping[str, list[int]]], domains: Sequence[str]
) -> dict[str, object]:
    """Return means over clients, and by domain, of bits per byte and scores, and those of each client.

    Args:
        texts: by client id.
        counts: right and total tokens, ``local``, by client id.
        domains: their names.
    """
    by_domain: dict[str, dict[str, object]] = {}
    for position, name in enumerate(domains):
        held = [client for client, text in texts.items() if text.domain == position]
        if held:
            accuracies = [counts[client]["local"][0] / counts[client]["local"][1] for client in held]
            bits = [texts[client].bits for client in held]
            by_domain[name] = {"bits_per_byte": sum(bits) / len(held), "accuracy": sum(accuracies) / len(held)}
            if names := texts[held[0]].scores:
                by_domain[name]["scores"] = {n: sum(texts[c].scores[n] for c in held) / len(held) for n in names}
    bits_of = {client: text.bits for client, text in texts.items()}
    means = {"bits_per_byte": sum(bits_of.values()) / len(bits_of), "domains": by_domain, "bits": bits_of}
    scores_of = {client: text.scores for client, text in texts.items() if text.scores}
    return means | ({"scores": scores_of} if scores_of else {})


def _text_of(reply: Reply, task: Task, tuned: bool) -> TextResult:
    """Return what a client tells of its texts."""
    kinds = task.spec.kinds
    domain = reply.count("domain", len(kinds) - 1)
    scores = {name: _share_of(reply, name) for name in task.scores.get(kinds[domain], ())}
    more = _bits_of(reply, "tuned-bits-per-byte") if tuned else None
    return TextResult(_bits_of(reply, "bits-per-byte"), domain, scores, more)


def _bits_of(reply: Reply, name: str) -> float:
    if not 0 <= (bits := reply.number(name)) <= MOST_BITS:
        raise BadReply(f"{name}: not from 0 to {MOST_BITS:g}")
    return bits


def _right_of(reply: Reply, name: str, most: int) -> list[int]:
    right, total = reply.integers(name, 2, most)
    if not 0 < total >= right:
        raise BadReply(f"{name}: {right} right of {total}")
    return [right, total]


def _share_of(reply: Reply, name: str) -> float:
    if not 0 <= (share := reply.number(name)) <= 1:
        raise BadReply(f"{name}: expected a number from 0 to 1")
    return share


def read_inspection(reply: Reply, result: ClientResult, experts: int) -> torch.Tensor:
    """Return how many samples of each class each expert has right at a client, (experts, classes).

    Args:
        reply: of the client.
        result: what it told of its classes when it was scored.
        experts: how many there are.

    Raises:
        BadReply: more of a class than it has.
    """
    classes = len(result.classes)
    right = torch.tensor(reply.integers("right", experts * classes, result.samples)).view(experts, classes)
    if bool((right > result.classes).any()):
        raise BadReply("right: more right predictions than samples of a class")
    return right


def of_inspection(
    answers: Mapping[int, torch.Tensor], results: Mapping[int, ClientResult], experts: int
) -> dict[str, object]:
    """Return what a round's record says of every expert on every class, and of routes; a class nobody has is None.

    Args:
        answers: of :func:`read_inspection`, by client id.
        results: of all that were asked, by client id.
        experts: how many there are.
    """
    right = torch.zeros(experts, len(next(iter(results.values())).classes))
    classes = torch.zeros(right.shape[1])
    for client, counts in answers.items():
        right += counts
        classes += results[client].classes
    accuracy = right / classes
    table = [[None if value != value else round(value, 6) for value in row] for row in accuracy.tolist()]
    return {"expert_class_accuracy": table, "routing": routing(results, accuracy)}
