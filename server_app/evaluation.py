"""What clients that are scored reply: read, checked and averaged for :mod:`server_app.scoring`."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedjets_flwr.federation.reply_checks import check_samples
from fedjets_flwr.moe.metrics import READINGS, ClientResult, routing
from fedjets_flwr.names import expert_name
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import BadReply, Job, Reply
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


def score_participants(
    exchange: Exchange, server_round: int, strategy: Strategy, served: Mapping[int, tuple[str, ...]], tuned: bool
) -> tuple[dict[str, object], dict[int, str]]:
    """Have clients that train adapt what they are served and score it on their own test parts.

    With ``tuned`` they also score what more local training makes of it.

    Returns what the record says of it, and why clients failed: means over clients, and (right, total) of each, on its
    own test part (``local``) and on test images that all share (``global``, where the client has them).
    """
    numbers = {"reading": READINGS.index(strategy.reading)} | ({"tuned": 1} if tuned else {})
    jobs = [Job(c, names, (), numbers, cost=strategy.num_samples.get(c, 1)) for c, names in served.items()]
    kind = f"evaluate.{strategy.algorithm}"
    pending = exchange.request(kind, server_round, jobs, strategy.vectors, len, served=True)
    counts: dict[int, dict[str, list[int]]] = {}
    told: defaultdict[str, list[float]] = defaultdict(list)
    texts: dict[int, TextResult] = {}
    for reply in pending.replies():
        try:
            names = ("local", *(["global"] if "global" in reply.numbers else []))
            most = strategy.config.limits.max_samples
            counted = {name: _right_of(reply, name, most) for name in names}
            shares = {name: _share_of(reply, name) for name in strategy.tells}
            if strategy.task.tells:
                texts[reply.client] = _text_of(reply, strategy.task, tuned)
            for name, share in shares.items():
                told[name].append(share)
            counts[reply.client] = counted
        except BadReply as error:
            pending.reject(reply.client, str(error))
    if not counts:
        return {}, pending.failures
    right = {n: [c[n][0] / c[n][1] for c in counts.values() if n in c] for n in ("local", "global")}
    means = {name: sum(values) / len(values) for name, values in (right | told).items() if values}
    found = _of_texts(texts, counts, strategy.task.spec.kinds) if texts else {}
    if more := [text.tuned for text in texts.values() if text.tuned is not None]:
        found["tuned_bits_per_byte"] = sum(more) / len(more)
    return {**means, **found, "clients": counts}, pending.failures


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


def inspect(
    exchange: Exchange, server_round: int, strategy: Strategy, results: Mapping[int, ClientResult]
) -> tuple[dict[str, object], dict[int, str]]:
    """Measure every expert on every class of the unseen clients; this traffic is no part of any method.

    Nor do simulated clients hold what it brought; a site does.

    Returns what the record says of it, and why clients failed.
    """
    num_experts = strategy.num_experts
    experts = tuple(expert_name(m) for m in range(num_experts))
    jobs = [Job(client, experts, cost=result.samples) for client, result in results.items()]
    before, held = exchange.traffic.copy(), exchange.held.held_by(results)
    num_classes = len(next(iter(results.values())).classes)
    right, classes = torch.zeros(num_experts, num_classes), torch.zeros(num_classes)
    pending = exchange.request("query.inspect", server_round, jobs, strategy.vectors, len)
    for reply in pending.replies():
        result = results[reply.client]
        try:
            counts = torch.tensor(reply.integers("right", right.numel(), result.samples)).view_as(right)
        except BadReply as error:
            pending.reject(reply.client, str(error))
            continue
        if bool((counts > result.classes).any()):
            pending.reject(reply.client, "right: more right predictions than samples of a class")
            continue
        right += counts
        classes += result.classes
    exchange.traffic = before
    if strategy.task.simulates:
        exchange.held.restore({client: versions for client, versions in held.items() if client not in pending.failures})
    accuracy = right / classes
    table = [[None if value != value else round(value, 6) for value in row] for row in accuracy.tolist()]
    return {"expert_class_accuracy": table, "routing": routing(results, accuracy)}, pending.failures
