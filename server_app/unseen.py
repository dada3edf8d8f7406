"""The clients that never train: preparing everybody, and scoring what the unseen ones answer."""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedjets_flwr.config import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.evaluation import PRIORS, READINGS, ClientResult, routing
from fedjets_flwr.tracking import Tracker
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import Answer, BadReply, Job

log = logging.getLogger("flwr")


def prepare_all(exchange: Exchange, config: Config, tracker: Tracker) -> dict[int, int]:
    """Have every client embed its data; return the samples of each, and keep the controls in ``tracker``.

    A client that fails is left out until it is drawn.

    Raises:
        FedjetsError: too many failed, or no unseen client is left.
    """
    everyone = range(config.partition.clients + config.partition.unseen_clients)
    exchange.wait_for_nodes(everyone, config.limits)
    right: dict[int, list[int]] = {}
    samples = prepare(exchange, config, everyone, tracker, right)
    failed = exchange.failures
    if not right or len(failed) > config.limits.max_failure_share * len(everyone):
        client, reason = next(iter(failed.items()))
        raise FedjetsError(f"{len(failed)} of {len(everyone)} clients could not be prepared; client {client}: {reason}")
    means = [sum(counts[i] / samples[u] for u, counts in right.items()) / len(right) for i in range(len(PRIORS))]
    names = ("common_expert", "common_expert_em", "common_expert_masked")
    per_client = {u: counts[0] / samples[u] for u, counts in right.items()}
    tracker.set_controls(dict(zip(names, means, strict=True)), per_client, tracker.embedded)
    return samples


def prepare(
    exchange: Exchange,
    config: Config,
    clients: Iterable[int],
    tracker: Tracker | None = None,
    right: dict[int, list[int]] | None = None,
) -> dict[int, int]:
    """Have clients embed their data; return the samples of those that could.

    ``right`` takes the common expert's right answers of unseen clients, one for each of ``evaluation.PRIORS``.
    """
    samples: dict[int, int] = {}
    for answer in exchange.ask("query.prepare", 0, [Job(client) for client in clients], {}):
        try:
            count = answer.count("num-examples", config.limits.max_samples)
            if count == 0:
                raise BadReply("num-examples = 0")
            computed = answer.count("computed", 1)
            if right is not None and answer.client >= config.partition.clients:
                right[answer.client] = answer.integers("common-right", len(PRIORS), count)
        except BadReply as error:
            exchange.reject(answer.client, str(error))
            continue
        samples[answer.client] = count
        if tracker is not None:
            tracker.embedded += computed
            if len(samples) % 10 == 0:
                tracker.say(f"embedded the data of {len(samples)} clients")
    return samples


def read_result(answer: Answer, experts: tuple[int, ...], samples: int, classes: int) -> ClientResult:
    """Return the counts of an unseen client that was served ``experts``.

    Raises:
        BadReply: the counts do not add up.
    """
    if answer.count("num-examples", samples) != samples:
        raise BadReply(f"num-examples: not the {samples} that the client was prepared with")
    grid = (len(experts), classes)
    answered, answered_right = (
        torch.tensor(answer.integers(name, grid[0] * grid[1], samples)).view(grid)
        for name in ("answered", "answered-right")
    )
    held = torch.tensor(answer.integers("classes", classes, samples))
    if (
        not torch.equal(answered.sum(dim=0), held)
        or int(held.sum()) != samples
        or bool((answered_right > answered).any())
    ):
        raise BadReply("answered, answered-right and classes do not add up")
    entropy = answer.number("gate-entropy")
    if not -1e-6 <= entropy <= 1 + 1e-6:
        raise BadReply("gate-entropy: expected a number from 0 to 1")
    return ClientResult(
        experts=experts,
        samples=samples,
        right=answer.integers("right", len(READINGS), samples),
        answered=answered,
        answered_right=answered_right,
        classes=held,
        gate_entropy=entropy,
    )


def inspect(
    exchange: Exchange,
    server_round: int,
    num_experts: int,
    results: Mapping[int, ClientResult],
    vectors: Mapping[str, Tensor],
) -> dict[str, object]:
    """Measure every expert on every class of the unseen clients; this traffic is no part of any method."""
    experts = tuple(f"expert.{m}" for m in range(num_experts))
    jobs = [Job(client, experts, cost=result.samples) for client, result in results.items()]
    before = exchange.traffic.copy()
    num_classes = len(next(iter(results.values())).classes)
    right, classes = torch.zeros(num_experts, num_classes), torch.zeros(num_classes)
    for answer in exchange.ask("query.inspect", server_round, jobs, vectors):
        result = results[answer.client]
        try:
            counts = torch.tensor(answer.integers("right", right.numel(), result.samples)).view_as(right)
        except BadReply as error:
            exchange.reject(answer.client, str(error))
            continue
        if bool((counts > result.classes).any()):
            exchange.reject(answer.client, "right: more right answers than samples of a class")
            continue
        right += counts
        classes += result.classes
    exchange.traffic = before
    accuracy = right / classes
    table = [[None if value != value else round(value, 6) for value in row] for row in accuracy.tolist()]
    return {"expert_class_accuracy": table, "routing": routing(results, accuracy)}
