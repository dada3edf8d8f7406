"""The SuperNodes: what each hosts, and who runs which job."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedjets_flwr.config.schema import Limits
from fedjets_flwr.errors import FedjetsError
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
    """What a SuperNode can run: any client (simulation), or the ones that it names; and which folders it sees."""

    any_client: bool
    clients: frozenset[int]
    has_common_expert: bool
    shared_token: str
    sees_private: bool


class Nodes:
    """The SuperNodes that described themselves, by Flower's node id.

    Attributes:
        hosts: what each hosts.
        facts: what every describe request carries: the common expert's digest, the folder in shared memory, and what
            names the clients' private state.
    """

    def __init__(self, grid: Grid, facts: dict[str, str]) -> None:
        self.grid, self.facts = grid, facts
        self.hosts: dict[int, Host] = {}

    def wait_for(self, clients: Iterable[int], limits: Limits) -> None:
        """Return when the nodes host ``clients``, or, after ``limits.node-seconds``, enough of them.

        Raises:
            FedjetsError: too few came, or two nodes claim one client.
        """
        wanted, start = set(clients), time.monotonic()
        while True:
            known = len(self.hosts)
            self.refresh(min(limits.node_seconds, limits.exchange_seconds))
            missing = wanted - {client for host in self.hosts.values() for client in host.clients}
            # A simulation registers its nodes while this runs: go on once no new one appears.
            if any(host.any_client for host in self.hosts.values()):
                missing = set()
            if not missing and known == len(self.hosts):
                break
            if time.monotonic() - start > limits.node_seconds:
                if len(missing) > limits.max_failure_share * len(wanted):
                    raise FedjetsError(
                        f"limits.node-seconds = {limits.node_seconds:g}: no SuperNode hosts client {min(missing)}"
                        f" ({len(missing)} of {len(wanted)} clients missing); start it, or raise the setting"
                    )
                log.warning("%d of %d clients have no SuperNode yet", len(missing), len(wanted))
                break
            time.sleep(SETTLE_SECONDS)
        owners = Counter(client for host in self.hosts.values() for client in host.clients)
        for client, count in owners.items():
            if client not in wanted:
                raise FedjetsError(
                    f"client-id={client}: not a client of this run (0 to {max(wanted)}); mend --node-config"
                )
            if count > 1:
                raise FedjetsError(f"client-id={client}: {count} SuperNodes claim it; give each its own --node-config")

    def refresh(self, seconds: float) -> None:
        """Ask the nodes that are new what they host, and forget the ones that left."""
        present = set(self.grid.get_node_ids())
        self.hosts = {node: host for node, host in self.hosts.items() if node in present}
        new = sorted(present - self.hosts.keys())
        messages = [Message(RecordDict({"request": ConfigRecord({**self.facts})}), n, "query.describe") for n in new]
        for reply in stream(self.grid, messages, seconds):
            try:
                if reply.has_error():
                    raise BadReply(last_line(reply.error.reason))
                host = read_host(reply.content)
            except BadReply as error:
                log.warning("a SuperNode did not describe itself: %s", error)
                continue
            # A node that restarted under a new id takes its clients over from the old one.
            for node, other in list(self.hosts.items()):
                if node not in new and (taken := other.clients & host.clients):
                    log.warning("another SuperNode now hosts %s", sorted(taken))
                    self.hosts[node] = replace(other, clients=other.clients - host.clients)
            self.hosts[reply.metadata.src_node_id] = host

    def hand_out(self, jobs: Sequence[Job]) -> tuple[dict[int, tuple[Job, ...]], list[int]]:
        """Return the jobs of each node, the longest handed out first, and the clients that no node hosts."""
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
    except (KeyError, TypeError):
        raise BadReply("it speaks another version; install the same release") from None
    if not isinstance(clients, list) or not all(isinstance(c, int) and c >= 0 for c in clients):
        raise BadReply("its clients are not ids")
    if any_client and not in_simulation():
        raise BadReply("it claims to host any client, outside a simulation")
    return Host(bool(any_client), frozenset(clients), has_common, token, sees_private)  # type: ignore[arg-type]


def stream(grid: Grid, messages: Sequence[Message], seconds: float) -> Iterator[Message]:
    """Send, and yield replies as they arrive, until all are there or ``seconds`` have passed."""
    if not messages:
        return
    start = time.monotonic()
    # Flower gives no id to a message that it could not store.
    waiting = {name for name in grid.push_messages(messages) if name}
    while waiting and time.monotonic() - start < seconds:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if waiting:
            # Deployed, each look is an HTTP request: look less often the longer it takes.
            least, most = POLL_SECONDS
            time.sleep(min(most, max(least, POLL_SHARE * (time.monotonic() - start))))


def in_simulation() -> bool:
    """Return whether this process is part of a Flower simulation; a deployed one never imports Ray."""
    # A module that another thread is importing has not all its names yet.
    initialized = getattr(sys.modules.get("ray"), "is_initialized", None)
    return initialized is not None and bool(initialized())


def last_line(reason: str | None) -> str:
    """Return the line of a traceback that says what was wrong."""
    lines = [line for line in str(reason).strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason"
