"""The server's side of an exchange: which node runs which client, sending, and answers in client order."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedjets_flwr.config import Limits
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common import CommonExpert
from fedjets_flwr.wire.messages import Answer, BadReply, Job, decode_answer, encode_request
from fedjets_flwr.wire.transport import Inline, Shared, SharedFolder, Transport

log = logging.getLogger("flwr")

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Host:
    """What a SuperNode can run: any client (simulation), or the ones that it names."""

    any_client: bool
    clients: frozenset[int]
    has_common_expert: bool
    sees_shared: bool


@dataclass
class Traffic:
    """Encoded bytes as if each client were alone on its node, and what physically moved."""

    down: int = 0
    up: int = 0
    wire: int = 0

    def copy(self) -> "Traffic":
        """Return a copy."""
        return replace(self)

    def since(self, before: "Traffic") -> dict[str, int]:
        """Return what was added since a copy was taken, by the names of the results."""
        return {
            "bytes_down": self.down - before.down,
            "bytes_up": self.up - before.up,
            "wire_bytes": self.wire - before.wire,
        }


@dataclass
class Exchange:
    """Hands jobs out over the SuperNodes and reads their answers.

    Attributes:
        grid: Flower's connection to the SuperNodes.
        transport: ``inline``, ``shared``, or ``auto``: shared where the node sees the folder and its memory has room.
        common: the common expert; a node that lacks it gets it with its first job.
        facts: digests that every request carries (layouts, common expert).
        sizes: floats of a vector by its kind, the part of its name before the dot.
        deadline: seconds that one exchange may take.
        moved: bytes that all exchanges so far physically moved, the ones that no result counts too.
    """

    grid: Grid
    deadline: float
    common: CommonExpert
    transport: str = "auto"
    facts: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    hosts: dict[int, Host] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    coding_seconds: float = 0.0
    moved: int = 0
    _came_by: dict[int, Transport] = field(default_factory=dict)
    _asked: list[tuple[Message, tuple[Job, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts["common-expert"] = self.common.digest
        self._shared = None if self.transport == "inline" else SharedFolder()
        self._sequence = 0

    def wait_for_nodes(self, clients: Iterable[int], limits: Limits) -> None:
        """Return when the nodes host ``clients``, or, after ``limits.node-seconds``, enough of them.

        Raises:
            FedjetsError: too few came, or two nodes claim one client.
        """
        wanted, start = set(clients), time.monotonic()
        while True:
            known = len(self.hosts)
            self.refresh(limits.node_seconds)
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
            time.sleep(0.3)
        owners = Counter(client for host in self.hosts.values() for client in host.clients)
        for client, count in owners.items():
            if client not in wanted:
                raise FedjetsError(
                    f"client-id={client}: not a client of this run (0 to {max(wanted)}); mend --node-config"
                )
            if count > 1:
                raise FedjetsError(f"client-id={client}: {count} SuperNodes claim it; give each its own --node-config")

    def refresh(self, seconds: float | None = None) -> None:
        """Ask the nodes that are new what they host, and forget the ones that left."""
        present = set(self.grid.get_node_ids())
        self.hosts = {node: host for node, host in self.hosts.items() if node in present}
        folder = str(self._shared.path) if self._shared else ""
        content = {"request": ConfigRecord({"common-expert": self.common.digest, "shared-folder": folder})}
        new = sorted(present - self.hosts.keys())
        messages = [Message(RecordDict(dict(content)), node, "query.describe") for node in new]
        for reply in self.stream(messages, seconds):
            try:
                if reply.has_error():
                    raise BadReply(_last_line(reply.error.reason))
                host = self._read_host(reply.content)
            except BadReply as error:
                log.warning("a SuperNode did not describe itself: %s", error)
                continue
            # A node that restarted under a new id takes its clients over from the old one.
            for node, other in list(self.hosts.items()):
                if node not in new and (taken := other.clients & host.clients):
                    log.warning("another SuperNode now hosts %s", sorted(taken))
                    self.hosts[node] = replace(other, clients=other.clients - host.clients)
            self.hosts[reply.metadata.src_node_id] = host

    def _read_host(self, content: RecordDict) -> Host:
        try:
            record = content.config_records["host"]
            clients, any_client, shared = record["clients"], record["any-client"], str(record["shared"])
            has_common = bool(record["has-common-expert"])
        except (KeyError, TypeError):
            raise BadReply("it speaks another version; install the same release") from None
        if not isinstance(clients, list) or not all(isinstance(c, int) and c >= 0 for c in clients):
            raise BadReply("its clients are not ids")
        if any_client and not in_simulation():
            raise BadReply("it claims to host any client, outside a simulation")
        sees_shared = self._shared is not None and shared == self._shared.token
        if self.transport == "shared" and not sees_shared:
            raise FedjetsError("transport.name = 'shared': a SuperNode does not see the server's memory; set 'auto'")
        return Host(bool(any_client), frozenset(clients), has_common, sees_shared)  # type: ignore[arg-type]

    def request(
        self, kind: str, server_round: int, jobs: Iterable[Job], vectors: Mapping[str, Tensor]
    ) -> list[Message]:
        """Return one message for each node that has a job, the longest jobs handed out first."""
        self._asked, self.failures = [], {}
        jobs = list(jobs)
        with self._coding():
            encode = self._encoder(jobs, vectors)
            for node, share in self._hand_out(jobs).items():
                names = sorted({name for job in share for name in job.vectors})
                transport, arrays = encode(self.hosts[node], names)
                content = encode_request(server_round, self.facts | transport.facts(), share, arrays)
                if not self.hosts[node].has_common_expert:
                    content["common-expert"] = ConfigRecord({"safetensors": self.common.as_bytes})
                    self._move(len(self.common.as_bytes))
                    self.hosts[node] = replace(self.hosts[node], has_common_expert=True)
                self.traffic.down += sum(4 * vectors[name].numel() for job in share for name in job.vectors)
                self._move(sum(len(array.data) for array in arrays.values()))
                self._asked.append((Message(content, node, kind), share))
                self._came_by |= {job.client: transport for job in share}
        return [message for message, _ in self._asked]

    def _encoder(
        self, jobs: Sequence[Job], vectors: Mapping[str, Tensor]
    ) -> Callable[[Host, Sequence[str]], tuple[Transport, dict[str, Array]]]:
        """Return what encodes vectors for a node, each vector once per transport."""
        shared, inline = self._shared_for(jobs, vectors), Inline()
        encoded: dict[tuple[Transport, str], Array] = {}

        def encode(host: Host, names: Sequence[str]) -> tuple[Transport, dict[str, Array]]:
            choices: list[Transport] = [shared, inline] if shared and host.sees_shared else [inline]
            for transport in choices:
                try:
                    for name in names:
                        if (transport, name) not in encoded:
                            encoded[transport, name] = transport.encode(name, vectors[name])
                except OSError as error:  # the memory filled up after all
                    log.warning("shared memory: %s; vectors travel in the messages", error)
                    continue
                return transport, {name: encoded[transport, name] for name in names}
            raise AssertionError("inline transport always encodes")

        return encode

    def stream(self, messages: Sequence[Message], seconds: float | None = None) -> Iterator[Message]:
        """Send, and yield replies as they arrive, until all are there or the deadline has passed."""
        if not messages:
            return
        start, pause, deadline = time.monotonic(), POLL_SECONDS, min(seconds or self.deadline, self.deadline)
        # Flower gives no id to a message that it could not store.
        waiting = {name for name in self.grid.push_messages(messages) if name}
        while waiting and time.monotonic() - start < deadline:
            arrived = list(self.grid.pull_messages(waiting))
            for reply in arrived:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if waiting:
                # Deployed, each look is an HTTP request: look less often the longer it takes.
                pause = POLL_SECONDS if arrived else min(1.0, pause * 1.05)
                time.sleep(pause)

    def answers(self, replies: Iterable[Message]) -> Iterator[Answer]:
        """Yield the good answers to the last request in client-id order; note the others in :attr:`failures`.

        An answer that is early waits undecoded, so that sums do not depend on which node was faster.
        """
        jobs = {job.client: job for _, share in self._asked for job in share}
        order = sorted(jobs)
        arrived: dict[int, RecordDict] = {}
        position = 0
        for reply in replies:
            # Flower gives a message its id when it is sent, which may be as late as the first reply.
            asked = reply.metadata.reply_to_message_id
            node, share = next(
                (
                    (sent.metadata.dst_node_id, share)
                    for sent, share in self._asked
                    if sent.metadata.message_id == asked
                ),
                (0, ()),
            )
            if reply.has_error():
                self.hosts.pop(node, None)  # it may have lost the common expert: it is asked again
            for job in share:
                if reply.has_error():
                    self._fail(job.client, _last_line(reply.error.reason))
                else:
                    arrived[job.client] = reply.content
            while position < len(order) and (order[position] in arrived or order[position] in self.failures):
                yield from self._decode(jobs[order[position]], arrived.pop(order[position], None))
                position += 1
        for client in order[position:]:
            if client not in arrived and client not in self.failures:
                self._fail(client, f"no answer within limits.exchange-seconds = {self.deadline:g}")
            yield from self._decode(jobs[client], arrived.pop(client, None))

    def ask(self, kind: str, server_round: int, jobs: Iterable[Job], vectors: Mapping[str, Tensor]) -> Iterator[Answer]:
        """Send a request and yield the good answers in client-id order."""
        yield from self.answers(self.stream(self.request(kind, server_round, jobs, vectors)))

    def _decode(self, job: Job, content: RecordDict | None) -> Iterator[Answer]:
        if content is None:
            return
        transport = self._came_by[job.client]
        expected = {name: self.sizes[name.split(".")[0]] for name in job.returns}
        try:
            with self._coding():
                answer = decode_answer(content, job.client, expected, transport)
        except BadReply as error:
            self._fail(job.client, f"bad reply: {error}")
            return
        finally:
            if isinstance(transport, Shared):
                for name in expected:
                    transport.forget(f"{job.client}.{name}")
        if answer.error:
            self._fail(job.client, answer.error)
            return
        self.traffic.up += answer.bytes_up
        self._move(answer.bytes_up if isinstance(transport, Inline) else 0)
        yield answer

    def _move(self, count: int) -> None:
        self.traffic.wire += count
        self.moved += count

    def _shared_for(self, jobs: Sequence[Job], vectors: Mapping[str, Tensor]) -> Shared | None:
        """Return the shared transport of this exchange, if all that travels fits in the memory."""
        if self._shared is None:
            return None
        self._shared.clear()
        self._sequence += 1
        floats = sum(vectors[name].numel() for name in {name for job in jobs for name in job.vectors})
        floats += sum(self.sizes[name.split(".")[0]] for job in jobs for name in job.returns)
        if self._shared.has_room(4 * floats):
            return Shared(self._shared.path, self._sequence)
        if self.transport == "shared":
            raise FedjetsError(f"transport.name = 'shared': no room for {4 * floats} bytes there; set 'auto'")
        return None

    @contextmanager
    def _coding(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.coding_seconds += time.monotonic() - start

    def close(self) -> None:
        """Delete what lies in shared memory."""
        if self._shared is not None:
            self._shared.close()

    def reject(self, client: int, reason: str) -> None:
        """Note that an answer could not be used."""
        self._fail(client, f"bad reply: {reason}")

    def _fail(self, client: int, reason: str) -> None:
        self.failures[client] = reason
        log.warning("client %d: %s", client, reason)

    def _hand_out(self, jobs: Sequence[Job]) -> dict[int, tuple[Job, ...]]:
        shares: dict[int, list[Job]] = {}
        load: dict[int, float] = {}
        for job in sorted(jobs, key=lambda j: (-j.cost, j.client)):
            owners = [node for node, host in self.hosts.items() if job.client in host.clients]
            able = owners or [node for node, host in self.hosts.items() if host.any_client]
            if not able:
                self._fail(job.client, "no SuperNode hosts this client")
                continue
            node = min(able, key=lambda n: (load.get(n, 0.0), n))
            load[node] = load.get(node, 0.0) + job.cost
            shares.setdefault(node, []).append(job)
        return {node: tuple(sorted(share, key=lambda j: j.client)) for node, share in sorted(shares.items())}


def in_simulation() -> bool:
    """Return whether this process is part of a Flower simulation; a deployed one never imports Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _last_line(reason: str | None) -> str:
    lines = [line for line in str(reason).strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason"
