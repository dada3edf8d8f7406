"""Clients of a few samples whose experts are linear, so that what they train has a closed form.

An expert is a linear classifier over the four penultimate features of a common expert with random weights; the gate
reads its ten logits. Clients hold unequal numbers of digits.
"""

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
from client_app.client import Site
from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.data.clients import open_client, open_dataset
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.wire.messages import Answer, Job
from strategies import Method

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


def tiny_site(folder: Path, **changes: Scalar) -> Site:
    """Return a process that serves the clients."""
    return Site(tiny(run__cache_dir=str(folder), **changes), common_expert())


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
class CannedExchange:
    """Stands where the exchange does: gives prepared answers, and keeps what was asked and refused."""

    given: Sequence[Answer] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    asked: list[tuple[str, int, list[Job]]] = field(default_factory=list)
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    refreshed: list[float] = field(default_factory=list)

    @property
    def nodes(self) -> SimpleNamespace:
        return SimpleNamespace(refresh=self.refreshed.append)

    def request(self, kind: str, server_round: int, jobs: Iterable[Job], vectors: Mapping[str, Tensor]) -> list[str]:
        self.failures, self.sent = {}, dict(vectors)
        self.asked.append((kind, server_round, list(jobs)))
        return ["the messages"]

    def ask(self, kind: str, server_round: int, jobs: Iterable[Job], vectors: Mapping[str, Tensor]) -> list[Answer]:
        self.request(kind, server_round, jobs, vectors)
        return list(self.given)

    def answers(self, replies: Iterable[Answer]) -> list[Answer]:
        return list(replies)

    def reject(self, client: int, reason: str) -> None:
        self.failures[client] = reason


def tiny_method(name: str, answers: Sequence[Answer] = (), **changes: Scalar) -> Any:
    """Return a method before its first round, with its initial state, whose clients gave ``answers``."""
    config = tiny(strategy__name=name, **changes)
    made: Method = strategies.method(name)(config, common_expert(), open_dataset(config), *[SimpleNamespace()] * 2)
    made.exchange = CannedExchange(answers)  # type: ignore[assignment]
    made.vectors = made.initial_vectors()
    made.anchors = tuple(range(config.num_anchors))
    clients = range(config.partition.clients + config.partition.unseen_clients)
    made.samples = {client: len(samples_of(config, client)) for client in clients}
    return made
