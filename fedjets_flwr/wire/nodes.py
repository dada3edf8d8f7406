"""The SuperNodes: what each hosts, and who runs which job."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedjets_flwr.config.sections import Limits
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import one_line
from fedjets_flwr.wire.backoff import Backoff
from fedjets_flwr.wire.binding import Binding, key_of
from fedjets_flwr.wire.messages import BadReply, Job

log = logging.getLogger("flwr")

POLL_SECONDS = (0.01, 1.0)
"""Shortest and longest pause between two looks for replies."""
POLL_SHARE = 0.01
"""A pause as a share of the time waited so far: a reply is late by no more than that."""
SETTLE_SECONDS = 0.3
"""Pause between two looks for nodes; one without a new node ends the waiting."""


@dataclass(frozen=True)
class Host:
    """What a SuperNode can run: any client (simulation), or the ones that it names; and what else it tells of itself.

    Attributes:
        any_client: it runs whichever it is asked for.
        clients: ids of those that it names.
        has_common_expert: the common expert lies there already.
        shared_token: what it read in the server's shared memory; nothing: it does not see that.
        sees_private: it sees the folder of what clients keep.
        opted_out: its client takes no part in rounds.
        imitates: its device only imitates the precision in which it is to train.
    """

    any_client: bool
    clients: frozenset[int]
    has_common_expert: bool
    shared_token: str
    sees_private: bool
    opted_out: bool = False
    imitates: bool = False


class Nodes:
    """The SuperNodes that described themselves, by Flower's node id.

    Attributes:
        hosts: what each hosts.
        keys: what each is known by, its key's fingerprint.
        facts: what every describe request carries: the common expert's digest, the folder in shared memory, and what
            names the clients' private state.
        binding: which key speaks for which client.
        refused: why nodes are not used, by the fingerprint of their keys; whoever reads it clears it.
    """

    def __init__(self, grid: Grid, facts: dict[str, str], binding: Binding | None = None) -> None:
        self.grid, self.facts, self.binding = grid, facts, binding or Binding()
        self.hosts: dict[int, Host] = {}
        self.keys: dict[int, str] = {}
        self.refused: dict[str, str] = {}
        self._asked: dict[str, int] = {}  # describe requests without an answer yet: message id -> node
        self._mute: Backoff[int] = Backoff()
        self._turn = 0

    @property
    def simulated(self) -> bool:
        """Whether no SuperNode hosts clients of its own."""
        return all(host.any_client for host in self.hosts.values())

    def wait_for(self, clients: Iterable[int], limits: Limits) -> None:
        """Return when the nodes host ``clients``, or, after ``limits.node-seconds``, enough of them.

        Raises:
            FedjetsError: too few came.
        """
        wanted, start = set(clients), time.monotonic()
        while True:
            known = len(self.hosts)
            self.refresh(wanted, min(limits.node_seconds, limits.exchange_seconds))
            missing = self.missing(wanted)
            # A simulation registers its nodes while this runs: go on once no new one appears.
            if not missing and known == len(self.hosts):
                return
            if time.monotonic() - start > limits.node_seconds:
                if len(missing) > limits.max_failure_share * len(wanted):
                    why = "".join(f"; one was refused: {reason}" for reason in list(self.refused.values())[:1])
                    raise FedjetsError(
                        f"limits.node-seconds = {limits.node_seconds:g}: no SuperNode hosts client {min(missing)}"
                        f" ({len(missing)} of {len(wanted)} clients missing); start it, or raise the setting{why}"
                    )
                log.warning("%d of %d clients have no SuperNode yet", len(missing), len(wanted))
                return
            time.sleep(SETTLE_SECONDS)

    @property
    def opted_out(self) -> frozenset[int]:
        """The clients whose own sites say that they take no part in rounds."""
        return frozenset(client for host in self.hosts.values() if host.opted_out for client in host.clients)

    def missing(self, clients: Iterable[int]) -> set[int]:
        """Return the clients that no node hosts."""
        if any(host.any_client for host in self.hosts.values()):
            return set()
        return set(clients) - {client for host in self.hosts.values() for client in host.clients}

    def refresh(self, wanted: Iterable[int], seconds: float) -> None:
        """Ask the nodes that are new what they host, forget the ones that left, and take the answers that are there.

        It waits for answers where a client of ``wanted`` has no node, ``seconds`` at most, and the less often for a
        node the longer that has been mute.
        """
        self._turn += 1
        self.keys = present = {node.node_id: key_of(node) for node in self.grid.get_nodes()}
        self.hosts = {node: host for node, host in self.hosts.items() if node in present}
        self._asked = {name: node for name, node in self._asked.items() if node in present}
        known = {*self.hosts, *self._asked.values()}
        self._ask([node for node in sorted(present) if node not in known and self._awake(node)], seconds)

        def settled() -> bool:
            simulated = any(host.any_client for host in self.hosts.values())  # each node more is a process more
            return not (simulated or self.missing(wanted)) or not any(map(self._awake, self._asked.values()))

        for reply in replies_to(self.grid, self._asked, seconds, settled):
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            self._describe(node, present[node], reply)
        if not settled():
            for node in filter(self._awake, list(self._asked.values())):
                self._refuse(node, present[node], f"it did not say within {seconds:g} s what it hosts")

    def _awake(self, node: int) -> bool:
        return not self._mute.resting(node, self._turn)

    def _ask(self, nodes: Sequence[int], seconds: float) -> None:
        """Ask nodes what they host."""
        request = RecordDict({"request": ConfigRecord({**self.facts})})
        names = self.grid.push_messages([Message(request, n, "query.describe", ttl=seconds) for n in nodes])
        self._asked |= {name: node for name, node in zip(names, nodes, strict=True) if name}

    def _describe(self, node: int, key: str, reply: Message) -> None:
        """Note what a node hosts, or why it is not used."""
        try:
            if reply.has_error():
                raise BadReply(last_line(reply.error.reason))
            host = read_host(reply.content)
            if why := self.binding.refusal(key, host.clients):
                raise BadReply(why)
        except BadReply as error:
            self._refuse(node, key, str(error))
            return
        self._mute.answered(node)
        # A site that restarted under a new id, but with its key, takes its client over from the old one.
        for other, old in self.hosts.items():
            self.hosts[other] = replace(old, clients=old.clients - host.clients)
        self.hosts[node] = host

    def _refuse(self, node: int, key: str, reason: str) -> None:
        """Note why a node is not used; it is asked again later, and less and less often."""
        log.warning("a SuperNode is not used: %s (its key: %s)", reason, key)
        self.refused[key] = reason
        self._mute.silent(node, self._turn)

    def hand_out(self, jobs: Sequence[Job]) -> tuple[dict[int, tuple[Job, ...]], list[int]]:
        """Return the jobs of each node, the longest dealt first, and the clients that no node hosts."""
        shares: dict[int, list[Job]] = {}
        load: dict[int, float] = {}
        homeless = []
        owners = {client: node for node, host in self.hosts.items() for client in host.clients}
        anywhere = [node for node, host in self.hosts.items() if host.any_client]
        for job in sorted(jobs, key=lambda j: (-j.cost, j.client)):
            able = [owners[job.client]] if job.client in owners else anywhere
            if not able:
                homeless.append(job.client)
                continue
            node = min(able, key=lambda n: (load.get(n, 0.0), n))
            load[node] = load.get(node, 0.0) + job.cost
            shares.setdefault(node, []).append(job)
        return {node: tuple(sorted(share, key=lambda j: j.client)) for node, share in sorted(shares.items())}, homeless

    def got_common_expert(self, node: int) -> None:
        """Note that a node has, or is about to have, the common expert."""
        self.hosts[node] = replace(self.hosts[node], has_common_expert=True)

    def lost(self, node: int) -> None:
        """Have a node described again: it may have lost the common expert."""
        self.hosts.pop(node, None)


def read_host(content: RecordDict) -> Host:
    """Return what a node says of itself.

    Raises:
        BadReply: it is of another version, or claims what it cannot be.
    """
    try:
        record = content.config_records["host"]
        clients, any_client, token = record["clients"], record["any-client"], str(record["shared"])
        has_common, sees_private = bool(record["has-common-expert"]), bool(record["sees-private"])
        opted_out, imitates = bool(record["opted-out"]), bool(record["imitates"])
    except (KeyError, TypeError):
        raise BadReply("it speaks another version; install the same release") from None
    if not isinstance(clients, list) or not all(type(c) is int and c >= 0 for c in clients):
        raise BadReply("its clients are not ids")
    if any_client and not in_simulation():
        raise BadReply("it claims to host any client, outside a simulation")
    held: frozenset[int] = frozenset(clients)  # type: ignore[arg-type]
    return Host(bool(any_client), held, has_common, token, sees_private, opted_out, imitates)


def stream(
    grid: Grid, messages: Sequence[Message], seconds: float, settled: Callable[[], bool] = lambda: False
) -> Iterator[Message]:
    """Send, and yield replies as they arrive, until all are there, ``seconds`` have passed, or the rest can go."""
    if not messages:
        return
    # Flower gives no id to a message that it could not store.
    waiting = dict.fromkeys(name for name in grid.push_messages(messages) if name)
    for reply in replies_to(grid, waiting, seconds, settled):
        waiting.pop(reply.metadata.reply_to_message_id)
        yield reply


def replies_to(
    grid: Grid, waiting: Mapping[str, object], seconds: float, settled: Callable[[], bool]
) -> Iterator[Message]:
    """Yield replies to the messages of ``waiting``, from which whoever reads them takes those that came.

    It ends when none is left, when ``seconds`` have passed, or, once it has looked, when the rest need not be waited
    for.
    """
    start = time.monotonic()
    while waiting:
        # What comes twice, or answers an older message, is none of them.
        yield from (r for r in grid.pull_messages(set(waiting)) if r.metadata.reply_to_message_id in waiting)
        passed = time.monotonic() - start
        if not waiting or settled() or passed > seconds:
            return
        # Deployed, each look is an HTTP request: look less often the longer it takes.
        least, most = POLL_SECONDS
        time.sleep(min(most, max(least, POLL_SHARE * passed)))


def in_simulation() -> bool:
    """Return whether this process is part of a Flower simulation; a deployed one never imports Ray."""
    # A module that another thread is importing has not all its names yet.
    initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
    return initialized is not None and bool(initialized())


def last_line(reason: str | None) -> str:
    """Return the line of a traceback that says what was wrong, printable."""
    lines = [line for line in str(reason).strip().splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "no reason"
