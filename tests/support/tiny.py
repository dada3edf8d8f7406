"""Clients of a few samples whose experts are linear, so that what they train has a closed form.

An expert is a linear classifier over the four penultimate features of a common expert with random weights; the gate
reads its ten logits. Clients hold unequal numbers of digits.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import strategies
from client_app.client import ClientContext
from client_app.runtime import Runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.models.expert import expert_architecture
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.messages import Job, Reply
from server_app.preparation import Prepared
from server_app.rounds import Rounds

FEATURES, CLASSES, HIDDEN, EXPERTS = 4, 10, 6, 3
TINY: dict[str, Scalar] = {
    "partition.name": "dirichlet", "partition.alpha": 0.5, "partition.clients": 7, "partition.unseen-clients": 2,
    "partition.samples-per-client": 15, "partition.unseen-samples": 12, "moe.experts": EXPERTS, "moe.top-k": 2,
    "moe.trainable": "head", "gate.hidden": HIDDEN, "gate.lr": 0.7, "cohort.anchors": 2, "cohort.normals": 3,
    "common-expert.embedding": "logits", "train.lr": 0.3, "train.momentum": 0.5, "train.weight-decay": 0.1,
    "train.batch-size": 5, "train.local-epochs": 2, "train.schedule": "cosine", "run.rounds": 4, "run.device": "cpu",
    "transport.name": "inline",
}  # fmt: skip


def tiny(**changes: Scalar) -> Config:
    """Return the settings, changed (``moe__top_k=2`` means ``moe.top-k = 2``)."""
    return Config.from_flat(TINY | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})


@cache
def common_expert() -> CommonExpert:
    """A common expert that nobody trained, with features of one size that differ between images."""
    architecture = Architecture("cnn", FEATURES // 2, "batch", "cifar", 1, CLASSES)
    model = build(architecture, 3)
    model.load_state_dict({name: 4 * value if "head" in name else value for name, value in model.state_dict().items()})
    return CommonExpert(freeze(model), architecture, (0.3,), (0.1,), "digits", 0.1)


def tiny_runtime(folder: Path, **changes: Scalar) -> Runtime:
    """Return a process that serves the clients."""
    config = tiny(run__cache_dir=str(folder), **changes)
    architecture = expert_architecture(config, common_expert(), open_task(config).spec, config.moe.init)
    return Runtime(config, common_expert(), [architecture])


def context_of(runtime: Runtime, job: Job, server_round: int) -> ClientContext:
    """Return what an algorithm gets for a job."""
    return ClientContext(runtime, job, server_round, runtime.data(job.client))


@dataclass(frozen=True)
class Samples:
    """What one client holds, in float64: inputs of experts (n, d) and of the gate (n, e), labels (n,)."""

    x: np.ndarray
    h: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


def samples_of(config: Config, client: int) -> Samples:
    """Return a client's samples as the common expert sees them."""
    images, common = open_client(config, client).images, common_expert()
    with torch.inference_mode():
        features = common.model[:-1](common.normalise(images.pixels))
        logits = common.model[-1](features)
    return Samples(features.double().numpy(), logits.double().numpy(), images.labels.numpy())


def start_vectors(*names: str) -> dict[str, Tensor]:
    """Return random weights of the experts and the gate named."""
    expert = FEATURES * CLASSES + CLASSES
    gate = (CLASSES + 1) * HIDDEN + (HIDDEN + 1) * EXPERTS
    sizes = {name: gate if name == "gate" else expert for name in names}
    return {n: torch.randn(s, generator=torch.Generator().manual_seed(sum(map(ord, n)))) for n, s in sizes.items()}


@dataclass
class CannedReplies:
    """Stands where an exchange under way does: gives prepared replies, and keeps what was refused."""

    given: Sequence[Reply]
    failures: dict[int, str] = field(default_factory=dict)
    messages: tuple[str, ...] = ("the messages",)
    jobs: Mapping[int, Job] = field(default_factory=lambda: defaultdict(lambda: Job(-1)))
    late: Sequence[int] = ()

    def replies(self) -> list[Reply]:
        return list(self.given)

    def read(self, replies: Iterable[Reply]) -> list[Reply]:
        return list(replies)

    def reject(self, client: int, reason: str) -> None:
        self.failures[client] = reason


@dataclass
class CannedExchange:
    """Stands where the exchange does: has prepared replies, and keeps what was asked.

    Attributes:
        given: the replies to whatever is asked.
        failures: who fails in whatever is asked.
        asked: (kind, round, jobs) of all that was.
        sent: what the last jobs could name.
        size_of: floats of a vector, as the last request had it.
        served: whether what was asked is for clients' own predictions.
        opted_out: clients whose sites say that they take no part.
        shares_memory: whether clients read the server's.
        received: (client, names) of what clients took that no job named.
    """

    given: Sequence[Reply] = ()
    failures: dict[int, str] = field(default_factory=dict)
    common: CommonExpert = field(default_factory=lambda: common_expert())
    asked: list[tuple[str, int, list[Job]]] = field(default_factory=list)
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    refreshed: list[tuple[list[int], float]] = field(default_factory=list)
    size_of: Any = None
    served: list[bool] = field(default_factory=list)
    opted_out: set[int] = field(default_factory=set)
    shares_memory: bool = False
    received: list[tuple[int, list[str]]] = field(default_factory=list)

    def count_down(self, client: int, names: Iterable[str], vectors: Mapping[str, Tensor]) -> None:
        self.received.append((client, list(names)))

    @property
    def nodes(self) -> SimpleNamespace:
        return SimpleNamespace(
            refresh=lambda clients, seconds: self.refreshed.append((clients, seconds)),
            refused={},
            opted_out=frozenset(self.opted_out),
        )

    def request(
        self,
        kind: str,
        server_round: int,
        jobs: Iterable[Job],
        vectors: Mapping[str, Tensor],
        size_of: Any,
        served: bool = False,
    ) -> CannedReplies:
        self.sent, self.size_of = dict(vectors), size_of
        self.served.append(served)
        self.asked.append((kind, server_round, list(jobs)))
        return CannedReplies(self.given, dict(self.failures))


@dataclass
class TinyMethod:
    """A method and its rounds, before the first one.

    Attributes:
        updated: the models that the last merging replaced.
    """

    rounds: Rounds
    exchange: CannedExchange
    updated: set[str] = field(default_factory=set)

    @property
    def strategy(self) -> Any:
        return self.rounds.strategy

    @property
    def vectors(self) -> dict[str, Tensor]:
        return self.rounds.strategy.vectors

    @vectors.setter
    def vectors(self, vectors: dict[str, Tensor]) -> None:
        self.rounds.strategy.vectors = vectors

    def planned(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Return who trains what, after the gate was asked."""
        cohort = Cohort(tuple(anchors), tuple(normals), server_round)
        routes = self.rounds.clients.route(server_round, self.strategy.to_route(cohort))
        return list(self.strategy.plan(cohort, routes))

    def merged(self, replies: Sequence[Reply], server_round: int = 1) -> dict[str, float]:
        """Make the next state of what a cohort replied."""
        self.rounds.cohort = Cohort((), tuple(reply.client for reply in replies), server_round)
        before = dict(self.vectors)
        found = self.rounds.merge(server_round, iter(replies))
        self.updated = {name for name, vector in before.items() if self.vectors[name] is not vector} - {"variate"}
        return found

    def refused(self, *replies: Reply) -> dict[int, str]:
        """Return the reasons by client for which replies do not count."""
        pending = CannedReplies(replies)
        self.rounds._pending = pending  # type: ignore[assignment]
        used = list(self.rounds._usable(replies))
        assert {r.client for r in used} | set(pending.failures) == {r.client for r in replies}
        assert not {r.client for r in used} & set(pending.failures)
        return pending.failures


def tiny_method(name: str, replies: Sequence[Reply] = (), **changes: Scalar) -> TinyMethod:
    """Return a method before its first round, with its initial state, whose clients gave ``replies``."""
    config = tiny(strategy__name=name, **changes)
    made = strategies.strategy(name)(config, common_expert(), open_task(config))
    made.vectors = made.state()
    made.anchors = tuple(range(config.num_anchors))
    clients = range(config.partition.clients + config.partition.unseen_clients)
    prepared = Prepared({client: len(samples_of(config, client)) for client in clients})
    exchange = CannedExchange(replies)
    rounds = Rounds(made, exchange, prepared)  # type: ignore[arg-type]
    rounds.clients.unseen, rounds.clients.unlabelled = [], []
    return TinyMethod(rounds, exchange)
