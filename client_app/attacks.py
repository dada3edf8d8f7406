"""Simulated attackers, to measure what robust aggregation is worth; they exist in a simulation alone.

A share of the training clients does otherwise than it is asked. They know all that the server does: its settings, its
rule and the samples that it judges by. Attackers of a smaller share are among those of a larger one, and a share of the
anchors is among them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from client_app.client import ClientContext, Update, Work
from client_app.runtime import Runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.names import expert_ids, expert_name
from fedjets_flwr.seeds import numpy_generator
from strategies import strategy

BOOST = 10.0
"""Factor of the boosted attacks."""
FORGED = 1000
"""Factor of forged counts."""
RUINED = 1e-4
"""Factor of ruined variances."""


@dataclass(frozen=True)
class Target:
    """One vector that an attacker poisons.

    Attributes:
        context: the attacker's.
        name: the vector's.
        sent: what the attacker was sent.
        trained: what honest training made of it.
        spec: its layout.
        generator: of the attacker's draws.
    """

    context: ClientContext
    name: str
    sent: Tensor
    trained: Tensor
    spec: VectorSpec
    generator: torch.Generator

    def with_update(self, update: Tensor) -> Tensor:
        """Return the poisoned vector. Running statistics stay: ruined ones give an attacker away."""
        weights = self.spec.trained
        return torch.cat([self.sent[:weights] + update[:weights], self.trained[weights:]])

    @property
    def update(self) -> Tensor:
        """The honest update."""
        return self.trained - self.sent


Poison = Callable[[Target], Tensor]
"""What an attacker replies in place of a vector."""


def sign_flip(target: Target) -> Tensor:
    """Return the honest update reversed and boosted."""
    return target.with_update(-BOOST * target.update)


def gaussian(target: Target) -> Tensor:
    """Return noise of a boosted update's size."""
    noise = torch.randn(target.sent.shape, generator=target.generator)
    return target.with_update(noise * (BOOST * target.update.norm() / noise.norm()))


def replacement(target: Target) -> Tensor:
    """Return what, averaged with the honest, puts the attacker's model in place: the trained one's opposite.

    Model replacement (Bagdasaryan et al. 2020, section 4.2), with the true boost: the number of clients in the average.
    """
    wanted = -target.trained
    return target.with_update(holders(target.context.config, target.name) * (wanted - target.sent))


def adaptive(target: Target) -> Tensor:
    """Return the honest update reversed, as far as the server takes it.

    Its length is that to which the rules clip, by the attacker's own honest one; where the server judges, it is halved
    until the judge is content.
    """
    config, factor = target.context.config, target.context.config.aggregation.clip_times
    vector = target.with_update(-factor * target.update)
    while config.aggregation.rule == "validated" and factor > 1e-3 and not _passes(target, vector):
        factor /= 2
        vector = target.with_update(-factor * target.update)
    return vector


def ruined_statistics(target: Target) -> Tensor:
    """Return the honest vector with running variances that are positive, and far too small."""
    vector, places = target.trained.clone(), target.spec.positions("running_var")
    vector[places] *= RUINED
    return vector


POISONS: dict[str, Poison] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "replacement": replacement,
    "adaptive": adaptive,
    "ruined-statistics": ruined_statistics,
}


def poisoning(poison: Poison, work: Work) -> Work:
    """Return honest work whose vectors are poisoned afterwards."""

    def attack(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        update, generator = work(context, vectors), context.generator("attack")
        targets = {
            slot: _target(context, _full_name(slot, update), vectors, vector, generator)
            for slot, vector in update.vectors.items()
        }
        return replace(update, vectors={slot: poison(target) for slot, target in targets.items()})

    return attack


def _full_name(slot: str, update: Update) -> str:
    """Return whose vector lies in a slot of a reply: where the client chose its model itself, that one's."""
    chosen = update.numbers.get("cluster")
    return expert_name(int(chosen)) if slot == "trained" and isinstance(chosen, int) else slot


def _target(
    context: ClientContext, name: str, vectors: Mapping[str, Tensor], trained: Tensor, generator: torch.Generator
) -> Target:
    """Return a vector to poison; one that was not sent, as SCAFFOLD's variates, begins at zero."""
    sent = vectors[name] if name in vectors else torch.zeros_like(trained)
    return Target(context, name, sent.cpu(), trained.cpu(), _spec(context, name, trained), generator)


def label_flip(work: Work) -> Work:
    """Return work on samples whose labels y are C - 1 - y, also in the offset of logits if training adjusts them."""

    def attack(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        data = context.data
        offset = data.offset.flip(-1) if isinstance(data.offset, Tensor) else data.offset
        flipped = replace(data, targets=flip(data.targets, context.num_classes), offset=offset)
        return work(replace(context, data=flipped), vectors)

    return attack


def forged_counts(work: Work) -> Work:
    """Return the sign flip with a forged number of samples, and so of weight in the average."""
    flipped = poisoning(sign_flip, work)

    def attack(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        update = flipped(context, vectors)
        return replace(update, numbers={**update.numbers, "num-examples": FORGED * len(context.data)})

    return attack


ATTACKS: dict[str, Callable[[Work], Work]] = {
    **{name: partial(poisoning, poison) for name, poison in POISONS.items()},
    "label-flip": label_flip,
    "forged-counts": forged_counts,
}
"""Honest work of a training round -> the attacker's."""


@lru_cache(maxsize=1)
def attackers(config: Config) -> frozenset[int]:
    """Return the ids of the training clients that attack."""
    clients, anchors = config.partition.clients, config.num_anchors
    count = round(config.attack.share * clients) if config.attack.kind != "none" else 0
    bad_anchors = min(count, math.ceil(config.attack.share * anchors))
    generator = numpy_generator(config.run.seed, "attackers")
    drawn: Iterable[int] = generator.permutation(anchors)[:bad_anchors].tolist()
    others: Iterable[int] = (anchors + generator.permutation(clients - anchors))[: count - bad_anchors].tolist()
    return frozenset((*drawn, *others))


def poisoned(train: Work) -> Work:
    """Return a client algorithm some of whose clients attack as ``attack.kind`` says."""

    def attack(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        bad = context.client in attackers(context.config)
        return (ATTACKS[context.config.attack.kind](train) if bad else train)(context, vectors)

    return attack


def holders(config: Config, name: str) -> float:
    """Return how many clients of a round train a vector, as far as one can know before."""
    if not expert_ids([name]):
        return config.cohort.anchors if config.gate.learns_from == "anchors" else config.cohort_size
    return max(1.0, strategy(config.strategy.name).holders(config))


def flip(labels: Tensor, num_classes: int) -> Tensor:
    """Return every label y as C - 1 - y."""
    return num_classes - 1 - labels


def _passes(target: Target, vector: Tensor) -> bool:
    judge = _judge(target.context.runtime)
    return all(judge.passes(m, vector, target.sent) for m in expert_ids([target.name]))


@lru_cache(maxsize=1)
def _judge(runtime: Runtime) -> Judge:
    count = runtime.config.moe.experts if len(runtime.architectures) == 1 else 1
    return Judge.of(runtime.config, runtime.task, runtime.common, runtime.architectures * count)


def _spec(context: ClientContext, name: str, vector: Tensor) -> VectorSpec:
    ids, specs = expert_ids([name]), context.runtime.specs
    return specs[ids[0] if len(specs) > 1 else 0] if ids else VectorSpec.plain(vector.numel())
