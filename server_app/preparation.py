"""Having every client embed its data: sizes, the controls, and what anchors are chosen by."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.consent import opted_out
from fedjets_flwr.data.partition import groups_held
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.federation.anchors import select_anchors
from fedjets_flwr.models.expert import gate_inputs
from fedjets_flwr.moe.controls import CONTROLS, measured
from fedjets_flwr.names import UNSEEN
from fedjets_flwr.seeds import derive
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.exchange import Exchange, PendingExchange
from fedjets_flwr.wire.messages import BadReply, Job, Reply

log = logging.getLogger("flwr")

MEAN = "mean-embedding"
AT_ONCE = 10_000
"""Clients that are asked together: the messages of all would take the server's memory."""


@dataclass
class Prepared:
    """What the clients told when they embedded their data, by client id.

    Attributes:
        num_samples: how many they hold.
        right: the common expert's right predictions of clients that never train and have labels, one for each of
            ``controls.CONTROLS``.
        means: mean embeddings (d,) of training clients, if asked for.
        computed: embeddings that had to be computed, one for a client's data.
        failures: why the others could not be prepared.
        late: those of them that did not answer in time.
        measured: keys of the controls that there are.
        opted_out: training clients that take no part, and were not asked for anything.
    """

    num_samples: dict[int, int] = field(default_factory=dict)
    right: dict[int, list[int]] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    computed: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)
    measured: Sequence[str] = tuple(CONTROLS)
    opted_out: frozenset[int] = frozenset()

    def add(self, later: "Prepared") -> None:
        """Take what clients told that were prepared later, or anew."""
        self.num_samples |= later.num_samples
        for client in later.num_samples.keys() - later.right.keys():
            self.right.pop(client, None)
        self.right |= later.right
        self.computed += later.computed

    def labelled(self, config: Config, role: str) -> list[int]:
        """Return the clients of a role that never trains which have labels."""
        return [client for client in sorted(self.right) if config.partition.role_of(client) == role]

    def controls(self, clients: Sequence[int]) -> dict[str, float | None]:
        """Return the accuracy of the common expert alone, by itself and corrected: means over clients with labels."""
        if not clients:
            return dict.fromkeys(self.measured)
        shares = [[count / self.num_samples[u] for count in self.right[u]] for u in clients]
        means = {name: sum(share[i] for share in shares) / len(shares) for i, name in enumerate(CONTROLS)}
        return {name: means[name] for name in self.measured}

    def per_client(self, clients: Sequence[int]) -> dict[int, float]:
        """Return the accuracy of the common expert by client."""
        return {client: self.right[client][0] / self.num_samples[client] for client in clients}

    def anchors(self, config: Config) -> tuple[int, ...]:
        """Return the anchors that the settings have chosen by the clients' mean embeddings."""
        how = config.cohort.anchor_selection
        found = select_anchors(self.means, config.num_anchors, how, derive(config.run.seed, "anchors"))
        log.info("anchors by %s: clients %s", how, ", ".join(map(str, found)))
        return found


def prepare_all(exchange: Exchange, config: Config, say: Callable[[str], None], with_means: bool) -> Prepared:
    """Have every client embed its data; one that fails is left out until it is drawn.

    Raises:
        FedjetsError: too many failed.
    """
    classifies = open_task(config).classifies
    everyone = range(config.partition.all_clients if classifies else config.partition.clients)
    exchange.wait_for_nodes(everyone)
    without = opted_out(config) | exchange.nodes.opted_out
    if without.issuperset(range(config.partition.clients)):
        log.warning("every training client has opted out: what the rounds train stays as it starts")
    asked = [client for client in everyone if client not in without]
    prepared = prepare(exchange, config, asked, say, with_means)
    prepared.opted_out = without
    failed = prepared.failures
    if len(failed) > config.limits.max_failure_share * len(asked):
        client, reason = next(iter(failed.items()))
        raise FedjetsError(f"{len(failed)} of {len(asked)} clients could not be prepared; client {client}: {reason}")
    if classifies and not prepared.labelled(config, UNSEEN):
        log.warning("no unseen client has labels: experts are chosen for them, but no accuracy is measured")
    return prepared


def most_samples(config: Config, client: int) -> int:
    """Return how many samples a client can have; where the partition is known here, those of its part."""
    most, task = config.limits.max_samples, open_task(config)
    return min(most, task.known(client)) if task.simulates else most


def prepare(
    exchange: Exchange,
    config: Config,
    clients: Iterable[int],
    say: Callable[[str], None] = lambda text: None,
    with_means: bool = False,
) -> Prepared:
    """Have clients embed their data; return what those said that could.

    Args:
        exchange: with the SuperNodes.
        config: the settings.
        clients: ids.
        say: is told of the progress.
        with_means: ask training clients for their mean embedding.
    """
    task, training = open_task(config), config.partition.clients
    known = task.simulates and task.classifies
    groups = groups_held(config, len(task.spec.classes))[0] if known else []
    prepared = Prepared(measured=measured(exchange.common.temperature, groups))
    means = Job(-1, returns=(MEAN,), numbers={MEAN: 1}) if with_means else Job(-1)
    sizes = {MEAN: gate_inputs(exchange.common, config.common_expert.embedding)} if with_means else {}
    asked = list(clients)

    def answers() -> Iterator[tuple[PendingExchange, Reply]]:
        for start in range(0, len(asked), AT_ONCE):
            some = asked[start : start + AT_ONCE]
            jobs = [replace(means if client < training else Job(-1), client=client) for client in some]
            pending = exchange.request("query.prepare", 0, jobs, {}, sizes.__getitem__)
            for reply in pending.replies():
                yield pending, reply
            prepared.failures |= pending.failures
            prepared.late += pending.late

    for pending, reply in answers():
        try:
            count = reply.count("num-examples", most_samples(config, reply.client))
            if count == 0:
                raise BadReply("num-examples = 0")
            computed = reply.count("computed", 1)
            if reply.count("labelled", 1) and reply.client >= training:
                prepared.right[reply.client] = reply.integers("common-right", len(CONTROLS), count)
            if (mean := reply.vectors.get(MEAN)) is not None:
                if not all_finite(mean):
                    raise BadReply(f"{MEAN} is not finite")
                prepared.means[reply.client] = mean.clone()  # its memory is the exchange's
        except BadReply as error:
            pending.reject(reply.client, str(error))
            continue
        prepared.num_samples[reply.client] = count
        prepared.computed += computed
        if len(prepared.num_samples) % 10 == 0:
            what = "embedded the data of" if task.classifies else "found the text of"
            say(f"{what} {len(prepared.num_samples)} clients")
    return prepared
