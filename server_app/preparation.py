"""Having every client embed its data: sizes, the controls, and what anchors are chosen by."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.moe.metrics import PRIORS
from fedjets_flwr.runs.tracking import Tracker
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import BadReply, Job

log = logging.getLogger("flwr")


@dataclass
class Prepared:
    """What the clients told when they embedded their data, by client id.

    Attributes:
        samples: how many they hold.
        right: the common expert's right answers of unseen clients that have labels, one for each of
            ``evaluation.PRIORS``.
        means: mean embeddings (d,) of training clients, if asked for.
    """

    samples: dict[int, int] = field(default_factory=dict)
    right: dict[int, list[int]] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)


def prepare_all(exchange: Exchange, config: Config, tracker: Tracker, with_means: bool) -> Prepared:
    """Have every client embed its data, and keep the controls in ``tracker``.

    A client that fails is left out until it is drawn.

    Raises:
        FedjetsError: too many failed.
    """
    everyone = range(config.partition.clients + config.partition.unseen_clients)
    exchange.wait_for_nodes(everyone)
    prepared = prepare(exchange, config, everyone, tracker, with_means)
    failed = exchange.failures
    if len(failed) > config.limits.max_failure_share * len(everyone):
        client, reason = next(iter(failed.items()))
        raise FedjetsError(f"{len(failed)} of {len(everyone)} clients could not be prepared; client {client}: {reason}")
    right, samples = prepared.right, prepared.samples
    if not right:
        log.warning("no unseen client has labels: experts are chosen for them, but no accuracy is measured")
    names = ("common_expert", "common_expert_em", "common_expert_masked")
    means = [sum(counts[i] / samples[u] for u, counts in right.items()) / max(1, len(right)) for i in range(len(names))]
    per_client = {u: counts[0] / samples[u] for u, counts in right.items()}
    controls = dict(zip(names, means if right else [None] * len(names), strict=True))
    tracker.set_controls(controls, per_client, tracker.embedded)
    return prepared


def prepare(
    exchange: Exchange,
    config: Config,
    clients: Iterable[int],
    tracker: Tracker | None = None,
    with_means: bool = False,
) -> Prepared:
    """Have clients embed their data; return what those said that could."""
    prepared, training = Prepared(), config.partition.clients
    means = Job(-1, returns=("mean-embedding",), numbers={"mean-embedding": 1}) if with_means else Job(-1)
    jobs = [replace(means if client < training else Job(-1), client=client) for client in clients]
    for answer in exchange.ask("query.prepare", 0, jobs, {}):
        try:
            count = answer.count("num-examples", config.limits.max_samples)
            if count == 0:
                raise BadReply("num-examples = 0")
            computed = answer.count("computed", 1)
            if answer.count("labelled", 1) and answer.client >= training:
                prepared.right[answer.client] = answer.integers("common-right", len(PRIORS), count)
            if (mean := answer.vectors.get("mean-embedding")) is not None:
                if not all_finite(mean):
                    raise BadReply("mean-embedding is not finite")
                prepared.means[answer.client] = mean.clone()  # its file in shared memory goes
        except BadReply as error:
            exchange.reject(answer.client, str(error))
            continue
        prepared.samples[answer.client] = count
        if tracker is not None:
            tracker.embedded += computed
            if len(prepared.samples) % 10 == 0:
                tracker.say(f"embedded the data of {len(prepared.samples)} clients")
    return prepared
