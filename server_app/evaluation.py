"""The clients that never train: scoring what they answer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedjets_flwr.moe.metrics import READINGS, ClientResult, routing
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import Answer, BadReply, Job


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
