"""The server's side of an exchange: which node runs which client, sending, and answers in client order."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

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
    _came_by: dict[int, Transport] = field(default_factory=dict)
    _asked: list[tuple[Message, tuple[Job, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts["common-expert"] = self.common.digest
        self._shared = None if self.transport == "inline" else SharedFolder()
        self._sequence = 0

    def wait_for_nodes(self, clients: Iterable[int], seconds: float) -> None:
        """Return when some node can run each of ``clients``.

        Raises:
            FedjetsError: it took longer than ``seconds``.
        """
        wanted, start = set(clients), time.monotonic()
        while True:
            self.refresh()
            if any(host.any_client for host in self.hosts.values()):
                return
            missing = wanted - {client for host in self.hosts.values() for client in host.clients}
            if not missing:
                return
            if time.monotonic() - start > seconds:
                raise FedjetsError(
                    f"limits.node-seconds = {seconds:g}: no SuperNode hosts client {min(missing)}"
                    f" ({len(missing)} of {len(wanted)} clients missing); start it, or raise the setting"
                )
            time.sleep(0.2)

    def refresh(self) -> None:
        """Ask the nodes that are new what they host, and forget the ones that left.

        Raises:
            FedjetsError: two nodes claim one client.
        """
        present = set(self.grid.get_node_ids())
        self.hosts = {node: host for node, host in self.hosts.items() if node in present}
        folder = str(self._shared.path) if self._shared else ""
        content = {"request": ConfigRecord({"common-expert": self.common.digest, "shared-folder": folder})}
        new = sorted(present - self.hosts.keys())
        messages = [Message(RecordDict(dict(content)), node, "query.describe") for node in new]
        for reply in self.stream(messages):
            if reply.has_error():
                log.warning("a SuperNode did not describe itself: %s", _last_line(reply.error.reason))
                continue
            record = reply.content.config_records["host"]
            self.hosts[reply.metadata.src_node_id] = Host(
                bool(record["any-client"]),
                frozenset(record["clients"]),  # type: ignore[arg-type]
                bool(record["has-common-expert"]),
                self._shared is not None and record["shared"] == self._shared.token,
            )
            if self.transport == "shared" and not self.hosts[reply.metadata.src_node_id].sees_shared:
                raise FedjetsError(
                    "transport.name = 'shared': a SuperNode does not see the server's memory; set 'auto'"
                )
        owner: dict[int, int] = {}
        for node, host in sorted(self.hosts.items()):
            for client in host.clients:
                if owner.setdefault(client, node) != node:
                    raise FedjetsError(f"client-id={client}: two SuperNodes claim it; give each its own --node-config")

    def request(
        self, kind: str, server_round: int, jobs: Iterable[Job], vectors: Mapping[str, Tensor]
    ) -> list[Message]:
        """Return one message for each node that has a job, the longest jobs handed out first."""
        self._asked, self.failures = [], {}
        jobs = list(jobs)
        shared, inline = self._transports(jobs, vectors)
        encoded: dict[tuple[Transport, str], Array] = {}
        for node, share in self._hand_out(jobs).items():
            transport = shared if shared and self.hosts[node].sees_shared else inline
            names = {name for job in share for name in job.vectors}
            for name in names:
                if (transport, name) not in encoded:
                    encoded[transport, name] = transport.encode(name, vectors[name])
            facts = self.facts | (shared.facts() if transport is shared and shared else {})
            content = encode_request(server_round, facts, share, {name: encoded[transport, name] for name in names})
            if not self.hosts[node].has_common_expert:
                content["common-expert"] = ConfigRecord({"safetensors": self.common.to_bytes()})
                self.hosts[node] = replace(self.hosts[node], has_common_expert=True)
            self.traffic.down += sum(4 * vectors[name].numel() for job in share for name in job.vectors)
            self.traffic.wire += sum(len(array.data) for array in content.array_records["vectors"].values())
            self._asked.append((Message(content, node, kind), share))
            self._came_by |= {job.client: transport for job in share}
        return [message for message, _ in self._asked]

    def stream(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Send, and yield replies as they arrive, until all are there or the deadline has passed."""
        if not messages:
            return
        start = time.monotonic()
        waiting = set(self.grid.push_messages(messages))
        while waiting and time.monotonic() - start < self.deadline:
            for reply in self.grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if waiting:
                time.sleep(POLL_SECONDS)

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
            for job in next((share for sent, share in self._asked if sent.metadata.message_id == asked), ()):
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
        self.traffic.wire += answer.bytes_up if isinstance(transport, Inline) else 0
        yield answer

    def _transports(self, jobs: Sequence[Job], vectors: Mapping[str, Tensor]) -> tuple[Shared | None, Inline]:
        """Return what this exchange may use: shared memory only while everything that travels fits in it."""
        if self._shared is None:
            return None, Inline()
        self._shared.clear()
        self._sequence += 1
        down = {name for job in jobs for name in job.vectors}
        floats = sum(vectors[name].numel() for name in down)
        floats += sum(self.sizes[name.split(".")[0]] for job in jobs for name in job.returns)
        if not self._shared.has_room(4 * floats):
            if self.transport == "shared":
                raise FedjetsError(f"transport.name = 'shared': no room for {4 * floats} bytes there; set 'auto'")
            return None, Inline()
        return Shared(self._shared.path, self._sequence), Inline()

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


def _last_line(reason: str | None) -> str:
    lines = [line for line in str(reason).strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason"
