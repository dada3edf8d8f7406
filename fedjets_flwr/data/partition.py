"""Who holds which samples: anchors, normal clients and unseen clients.

The splits of FedJETs, appendix A: ``quantity`` (strategy 1), ``dirichlet`` (strategy 2), and ``label-groups``, where a
client's labels are the union of whole anchor groups. The paper draws *with replacement* between clients and keeps the
unseen clients' label combinations out of training; no partitioner of flwr-datasets does either, so they are here. In
``domains`` clients differ in how their images look: in what is made of them, or in which folder of a domain they lie.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.domains import domains_held, domains_of
from fedjets_flwr.data.majority import Urn, class_pairs
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.seeds import numpy_generator

Indices = np.ndarray
Labels = frozenset[int]
NOBODYS = -1
"""In place of the label of a sample that no client may hold."""


@dataclass(frozen=True)
class Pool:
    """What samples are dealt from: the label of each, (n,), and its domain where the images themselves are of some."""

    labels: np.ndarray
    domains: np.ndarray | None = None


@dataclass(frozen=True)
class Split:
    """Sample indices by client id.

    Training clients are 0..S-1 (client m is the anchor of expert m for m < anchors) and index the train split; unseen
    clients are S..S+U-1 and index the test split; validation clients come after them and index the train split.

    Attributes:
        samples: by client id; of a training client those that it trains on, where ``val`` and ``test`` are dealt, too.
        val: of the training clients, indices of the train split; empty: :func:`own_part` takes them from ``samples``.
        test: of the training clients, indices of the test split; or empty.
    """

    samples: tuple[Indices, ...]
    anchors: int
    training: int
    unseen: int
    val: tuple[Indices, ...] = ()
    test: tuple[Indices, ...] = ()

    @property
    def unseen_ids(self) -> range:
        """Ids of the unseen clients."""
        return range(self.training, self.training + self.unseen)

    @property
    def validation_ids(self) -> range:
        """Ids of the validation clients."""
        return range(self.training + self.unseen, len(self.samples))


def public_samples(config: Config, of: int) -> Indices:
    """Return the training samples that are public, in a random order; clients hold none of them.

    They follow ``common-expert.seed`` alone, as does the common expert that is trained on them.
    """
    order = numpy_generator(config.common_expert.seed, "public").permutation(of)
    return order[: round(config.partition.public_share * of)]


def held_out(public: Indices) -> Indices:
    """Return the public samples that train no model: they stop the common expert, and are the validation clients'."""
    return public[: len(public) // 5]


@dataclass(frozen=True)
class Pools:
    """What the samples of each role are dealt from."""

    train: Pool
    unseen: Pool
    validation: Pool


def make_split(config: Config, train: Pool, test: Pool, num_classes: int) -> Split:
    """Return the split that the settings describe; the same settings give the same split in every process.

    Raises:
        FedjetsError: the labels or samples do not suffice.
    """
    part, public = config.partition, public_samples(config, len(train.labels))
    private = np.setdiff1d(np.arange(len(train.labels)), public)
    pools = Pools(_only(train, private), test, _only(train, held_out(public)))
    if part.public_share and not _holds_all(pools.train, num_classes):
        raise FedjetsError(
            f"partition.public-share = {part.public_share:g}: it leaves the clients no sample of some class; lower it"
        )
    if part.validation_clients and not _holds_all(pools.validation, num_classes):
        raise FedjetsError(
            f"partition.validation-clients = {part.validation_clients}: they hold public samples, a fifth of"
            f" partition.public-share = {part.public_share:g}, which lacks some class; set that to 0.2, say"
        )
    dealt = PARTITIONS[part.name](config, pools, num_classes)
    parts = dealt if isinstance(dealt, Dealt) else Dealt(dealt)
    for client, indices in enumerate(parts.samples):
        if len(indices) == 0:
            raise FedjetsError(
                f"partition.samples-per-client = {config.partition.samples_per_client}: client {client} holds no"
                " sample; raise it or lower partition.clients"
            )
    samples, *own = map(tuple, parts)
    return Split(samples, config.num_anchors, part.clients, part.unseen_clients, *own)


class Dealt(NamedTuple):
    """Samples by client id, and parts of the training clients' own where the partition deals them itself."""

    samples: Sequence[Indices]
    val: Sequence[Indices] = ()
    test: Sequence[Indices] = ()


def _only(pool: Pool, samples: Indices) -> Pool:
    """Return a pool of some of the samples, at their old places."""
    labels = np.full_like(pool.labels, NOBODYS)
    labels[samples] = pool.labels[samples]
    return replace(pool, labels=labels)


def _holds_all(pool: Pool, num_classes: int) -> bool:
    return len(np.unique(pool.labels[pool.labels != NOBODYS])) == num_classes


def anchor_groups(num_classes: int, anchors: int, generator: np.random.Generator) -> list[Labels]:
    """Return disjoint label sets, one per anchor, that cover all classes; sizes differ by one at most."""
    if anchors > num_classes:
        raise FedjetsError(
            f"partition.anchors = {anchors}: {num_classes} classes cannot be shared out to so many anchors;"
            " set it to at most the number of classes, or use partition.name = 'dirichlet'"
        )
    return [frozenset(map(int, part)) for part in np.array_split(generator.permutation(num_classes), anchors)]


def _quantity(config: Config, pools: Pools, num_classes: int) -> list[Indices]:
    rng = numpy_generator(config.run.seed, "partition")
    groups = anchor_groups(num_classes, config.num_anchors, rng)
    k = config.partition.labels_per_client
    if k > num_classes:
        raise FedjetsError(f"partition.labels-per-client = {k}: there are only {num_classes} classes; lower it")
    units = [frozenset([label]) for label in range(num_classes)]
    return _by_combination(config, pools, groups, units, k, rng)


def groups_held(config: Config, num_classes: int) -> tuple[list[Labels], int]:
    """Return the groups of classes of the label-groups split, and how many whole ones a client holds; else none."""
    if config.partition.name != "label-groups":
        return [], 0
    groups = anchor_groups(num_classes, config.num_anchors, numpy_generator(config.run.seed, "partition"))
    return groups, config.partition.labels_per_client * len(groups) // num_classes


def _label_groups(config: Config, pools: Pools, num_classes: int) -> list[Indices]:
    rng = numpy_generator(config.run.seed, "partition")
    groups = anchor_groups(num_classes, config.num_anchors, rng)
    per_client, rest = divmod(config.partition.labels_per_client * len(groups), num_classes)
    if rest or not 1 <= per_client <= len(groups) or num_classes % len(groups):
        raise FedjetsError(
            f"partition.labels-per-client = {config.partition.labels_per_client}: not a union of whole groups"
            f" ({len(groups)} anchors share {num_classes} classes); set it to a multiple of classes / anchors"
        )
    return _by_combination(config, pools, groups, groups, per_client, rng)


def _by_combination(
    config: Config,
    pools: Pools,
    groups: Sequence[Labels],
    units: Sequence[Labels],
    per_client: int,
    rng: np.random.Generator,
) -> list[Indices]:
    """Give every normal client ``per_client`` random units; who never trains gets combinations kept out of training."""
    part = config.partition
    # Anchors train, so a combination that an anchor holds is not unseen.
    held_by_anchors = [group for group in groups if sum(unit <= group for unit in units) == per_client]
    free = math.comb(len(units), per_client) - len(held_by_anchors)
    labels = per_client * max(map(len, units))
    for name, count in (("samples-per-client", part.samples_per_client), ("unseen-samples", part.unseen_samples)):
        if 0 < count < labels:
            raise FedjetsError(f"partition.{name} = {count}: a client holds {labels} labels; raise it to that at least")
    reserved: list[Labels] = []
    dealt: list[list[Labels]] = []
    wanted = {"unseen-clients": part.unseen_clients, "validation-clients": part.validation_clients}
    draws = (rng, _apart(config))
    for (name, count), draw in zip(wanted.items(), draws, strict=True):
        distinct = min(count, (free - len(reserved)) // 2)
        if distinct == 0 < count:
            raise FedjetsError(
                f"partition.labels-per-client = {part.labels_per_client}: only {free} label combinations are free of"
                f" anchors, none can be kept out of training for partition.{name}; change it or partition.anchors, or"
                " take partition.name = 'dirichlet' and partition.alpha = 1, which fit few classes"
            )
        if distinct < count and part.unseen_samples == 0:
            raise FedjetsError(
                f"partition.{name} = {count}: {distinct} label combinations are kept out of training, so clients share"
                " them and would be the same; lower it, or set partition.unseen-samples"
            )
        own = _reserve(units, per_client, distinct, [*held_by_anchors, *reserved], draw)
        dealt.append([own[position % distinct] for position in range(count)])
        reserved += own
    normals: list[Labels] = []
    while len(normals) < part.clients - len(groups):
        combination = _draw(units, per_client, rng)
        if combination not in reserved:
            normals.append(combination)
    holders = [*groups, *normals]
    train_pool = _by_label(pools.train.labels)
    samples = [_take(labels, train_pool, holders, part.samples_per_client, rng) for labels in holders]
    for held, pool, draw in zip(dealt, (pools.unseen, pools.validation), draws, strict=True):
        by_label = _by_label(pool.labels) if held else []
        samples += [_take(labels, by_label, [labels], part.unseen_samples, draw) for labels in held]
    return samples


def _apart(config: Config) -> np.random.Generator:
    """Return what the validation clients are drawn by: all other clients are as they are without them."""
    return numpy_generator(config.run.seed, "validation clients")


def _reserve(
    units: Sequence[Labels], per_client: int, count: int, taken: Sequence[Labels], rng: np.random.Generator
) -> list[Labels]:
    """Draw ``count`` distinct combinations in which every label occurs about equally often.

    Balance matters where combinations are few: unbalanced, all that hold some label could be kept out of training.
    """
    reserved: list[Labels] = []
    used: Counter[int] = Counter()
    while len(reserved) < count:
        drawn = [_draw(units, per_client, rng) for _ in range(64)]
        fresh = [labels for labels in drawn if labels not in reserved and labels not in taken]
        if fresh:
            least = min(used[label] for labels in fresh for label in labels)
            reserved.append(
                min(fresh, key=lambda labels: sum(4.0 ** min(used[label] - least, 500) for label in labels))
            )
            used.update(reserved[-1])
    return reserved


def _draw(units: Sequence[Labels], count: int, rng: np.random.Generator) -> Labels:
    return frozenset().union(*(units[i] for i in rng.choice(len(units), count, replace=False)))


def check_own_parts(config: Config) -> None:
    """Raise FedjetsError unless training clients hold validation and test parts of their own; with text all do."""
    if config.of_text:
        return
    for name, share in (("val-share", config.partition.val_share), ("test-share", config.partition.test_share)):
        if share == 0:
            raise FedjetsError(
                f"partition.{name} = 0: strategy.name = {config.strategy.name!r} trains models of the clients' own,"
                " which need that part of their samples; set it to 0.2, say"
            )


def own_part(config: Config, samples: Indices, of: int, part: str, *ids: int) -> Indices:
    """Return one of the disjoint parts of a training client's samples, ``train``, ``val`` or ``test``; or ``all``.

    A sample falls to one part for everybody: the partitions draw with replacement between clients, and what scores one
    client trains no other. So the sizes of a client's parts are near the shares, not equal to them.

    Args:
        config: ``partition.val-share``, ``partition.test-share`` and the seed.
        samples: the client's indices; their order stays.
        of: how many samples there are to fall to parts.
        part: which one.
        ids: what tells the set of samples from others of the same seed; none: the shared data set.

    Raises:
        FedjetsError: a part that the settings ask for is empty.
    """
    shares = {"val": config.partition.val_share, "test": config.partition.test_share}
    if part == "all" or not any(shares.values()):
        return samples if part in ("all", "train") else samples[:0]
    order = numpy_generator(config.run.seed, "own parts", *ids).permutation(of)
    stops = np.cumsum([round(share * of) for share in shares.values()])
    fallen = dict(zip((*shares, "train"), np.split(order, stops), strict=True))
    own = {name: samples[np.isin(samples, indices)] for name, indices in fallen.items()}
    for name, indices in own.items():
        if len(indices) == 0 and shares.get(name, 1):
            raise FedjetsError(
                f"partition.val-share = {shares['val']:g}, partition.test-share = {shares['test']:g}: none of a"
                f" client's {len(samples)} samples falls to {name}; change them, or raise partition.samples-per-client"
            )
    return own[part]


def _by_label(labels: np.ndarray) -> list[Indices]:
    return [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]


def _take(
    labels: Labels, pool: Sequence[Indices], holders: Sequence[Labels], total: int, rng: np.random.Generator
) -> Indices:
    """Draw ``total`` samples spread evenly over ``labels``; 0: an equal share of each label among its holders.

    Clients draw from the whole pool (with replacement between clients); one client repeats a sample only when its
    label has too few.
    """
    parts = []
    for position, label in enumerate(sorted(labels)):
        if total:
            count = total // len(labels) + (position < total % len(labels))
        else:
            count = len(pool[label]) // sum(label in held for held in holders)
        parts.append(rng.choice(pool[label], count, replace=count > len(pool[label])))
    return np.sort(np.concatenate(parts))


def _dirichlet(config: Config, pools: Pools, num_classes: int) -> list[Indices]:
    part = config.partition
    rng = numpy_generator(config.run.seed, "partition")
    training = _proportions(pools.train.labels, part.clients, part.samples_per_client, part.alpha, rng)
    unseen = _proportions(pools.unseen.labels, part.unseen_clients, part.unseen_samples, part.alpha, rng)
    if not (count := part.validation_clients):
        return training + unseen
    own = _proportions(pools.validation.labels, count, part.unseen_samples, part.alpha, _apart(config))
    return training + unseen + own


def _proportions(
    labels: np.ndarray, clients: int, per_client: int, alpha: float, rng: np.random.Generator, smallest: int = 8
) -> list[Indices]:
    """Share every label out by Dirichlet(alpha) proportions over the clients, drawing with replacement between them."""
    pool = _by_label(labels)
    budget = (per_client * clients or sum(map(len, pool))) / len(pool)
    for _ in range(200):
        counts = np.rint(rng.dirichlet(np.full(clients, alpha), size=len(pool)) * budget).astype(int)
        if counts.sum(axis=0).min() >= smallest:
            break
    else:
        raise FedjetsError(
            f"partition.alpha = {alpha}: some of the {clients} clients always get fewer than {smallest} samples;"
            " raise it or partition.samples-per-client, or lower the number of clients"
        )
    return [
        np.sort(np.concatenate([rng.choice(p, c, replace=c > len(p)) for p, c in zip(pool, column, strict=True)]))
        for column in counts.T
    ]


def _domains(config: Config, pools: Pools, num_classes: int) -> list[Indices]:
    """Give anchors all classes, everybody else ``labels-per-client`` of them; how they look is in ``domains.py``."""
    part, rng = config.partition, numpy_generator(config.run.seed, "partition")
    if not part.samples_per_client:
        raise FedjetsError("partition.samples-per-client = 0: the domains split needs a number; set it to 500, say")
    if pools.train.domains is None:
        domains_of(config)  # one that is none is told before anything starts
    k = min(part.labels_per_client, num_classes)
    everything = frozenset(range(num_classes))
    units = [frozenset([label]) for label in everything]
    clients = range(part.clients)
    holders = [everything if client < config.num_anchors else _draw(units, k, rng) for client in clients]
    own = _by_domain(config, pools.train, num_classes)
    samples = [_take_domains(config, c, holders[c], own, part.samples_per_client, rng) for c in clients]
    for count, pool, draw in (
        (part.unseen_clients, pools.unseen, rng),
        (part.validation_clients, pools.validation, _apart(config)),
    ):
        own = _by_domain(config, pool, num_classes) if count else []
        held = [_draw(units, k, draw) for _ in range(count)]
        samples += [
            _take_domains(config, client, labels, own, part.unseen_samples, draw)
            for client, labels in enumerate(held, len(samples))
        ]
    return samples


def _by_domain(config: Config, pool: Pool, num_classes: int) -> list[list[Indices]]:
    """Return sample indices by label of each domain; one pool for all, if how images look is made of them later."""
    if pool.domains is None:
        return [_by_label(pool.labels)]
    own = [np.where(pool.domains == domain, pool.labels, NOBODYS) for domain in range(len(config.domain_names))]
    return [[np.flatnonzero(labels == label) for label in range(num_classes)] for labels in own]


def _take_domains(
    config: Config, client: int, labels: Labels, pools: list[list[Indices]], total: int, rng: np.random.Generator
) -> Indices:
    """Draw a client's samples from the domains that it holds, alike from each; a domain may lack classes."""
    held = domains_held(config, client) if len(pools) > 1 else (0,)
    parts = []
    for position, domain in enumerate(held):
        there = frozenset(label for label in labels if len(pools[domain][label]))
        if not there:
            raise FedjetsError(
                f"partition.labels-per-client = {config.partition.labels_per_client}: domain"
                f" {config.domain_names[domain]!r} has no image of the classes that client {client} drew; raise it"
            )
        count = total // len(held) + (position < total % len(held))
        if total and not count:
            continue  # of more domains than samples; 0 would be all
        parts.append(_take(there, pools[domain], [there], count, rng))
    return np.concatenate(parts)


def _majority(config: Config, pools: Pools, num_classes: int) -> Dealt:
    """Give every client two classes that make up most of its samples (``majority.py``).

    What training clients train on, and what stops them, is disjoint over all; what scores them is drawn from the whole
    test split, as the samples of those that never train are.
    """
    part, rng = config.partition, numpy_generator(config.run.seed, "partition")
    total, count = part.samples_per_client, part.unseen_samples or part.samples_per_client
    if not total:
        raise FedjetsError("partition.samples-per-client = 0: the majority split needs a number; set it to 500, say")
    if num_classes < 3:
        raise FedjetsError(f"partition.name = 'majority': {num_classes} classes are too few; set it to 'dirichlet'")
    pairs = class_pairs(num_classes, part.clients, part.pairs, rng, part.all_clients - part.clients)
    val, test = round(part.val_share * total), round(part.test_share * total)
    for name, share, size in (("val", part.val_share, val), ("test", part.test_share, test)):
        if total <= val + test or (share and not size):
            raise FedjetsError(
                f"partition.samples-per-client = {total}: too few for a part to train on and partition.{name}-share ="
                f" {share:g}; raise it"
            )
    own, tested = Urn(_by_label(pools.train.labels), rng, False), Urn(_by_label(pools.unseen.labels), rng, True)

    def deal(urn: Urn, size: int, clients: Sequence[tuple[int, int]]) -> list[Indices]:
        return [urn.draw(pair, size, part.majority_share) for pair in clients] if size else []

    training, others = pairs[: part.clients], pairs[part.clients :]
    samples, stops = deal(own, total - val - test, training), deal(own, val, training)
    scores = deal(tested, test, training)
    samples += deal(tested, count, others[: part.unseen_clients])
    if part.validation_clients:
        held = Urn(_by_label(pools.validation.labels), _apart(config), True)
        samples += deal(held, count, others[part.unseen_clients :])
    return Dealt(samples, stops, scores)


PARTITIONS: dict[str, Callable[[Config, Pools, int], list[Indices] | Dealt]] = {
    "quantity": _quantity,
    "label-groups": _label_groups,
    "dirichlet": _dirichlet,
    "majority": _majority,
    "domains": _domains,
}
