"""The server's side of an exchange: requests, each vector encoded once, and replies in client order."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.names import expert_ids
from fedjets_flwr.wire.binding import Binding
from fedjets_flwr.wire.messages import BadReply, Job, Reply, decode_reply, encode_request
from fedjets_flwr.wire.nodes import Host, Nodes, last_line, stream
from fedjets_flwr.wire.transport import WIDTHS, Inline, Shared, SharedFolder, Transport, byte_array
from fedjets_flwr.wire.vector_cache import VectorLedger

log = logging.getLogger("flwr")


@dataclass
class Traffic:
    """Encoded bytes as if each client were alone on its node, and what physically moved.

    ``down`` and ``up`` are those of training, ``served`` what clients got for predictions of their own: unseen ones,
    and training clients that are scored. A vector that a client holds
    already counts for nothing, also in a simulation, where nobody keeps it and it moves all the same.
    """

    down: int = 0
    up: int = 0
    served: int = 0
    wire: int = 0

    def copy(self) -> "Traffic":
        """Return a copy."""
        return replace(self)

    def since(self, before: "Traffic") -> dict[str, int]:
        """Return what was added since a copy was taken, by the names of the results."""
        return {
            "bytes_down": self.down - before.down,
            "bytes_up": self.up - before.up,
            "bytes_served": self.served - before.served,
            "wire_bytes": self.wire - before.wire,
        }


SizeOf = Callable[[str], int]
"""Floats of a vector by its full name."""


def enough(share: float, nodes: int) -> int:
    """Return how many of ``nodes`` are a share of them, rounded up: 7 of 25 for 0.28, whatever a float makes of it."""
    return math.ceil(share * nodes - 1e-9)


@dataclass
class PendingExchange:
    """One exchange under way: what was asked of whom, and what became of it.

    Attributes:
        kind: Flower's message type, with the action.
        server_round: of the run.
        messages: one for each node that has a job, the longest jobs handed out first.
        jobs: what was asked, by client id.
        failures: why a client's reply does not count, by client id; complete once the replies were read to their end.
        late: those of them that did not answer in time.
    """

    exchange: "Exchange"
    size_of: SizeOf
    kind: str
    server_round: int
    messages: list[Message] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)
    shares: list[tuple[Message, tuple[Job, ...]]] = field(default_factory=list)
    transports: dict[int, Transport] = field(default_factory=dict)

    def replies(self) -> Iterator[Reply]:
        """Send the messages and yield the good replies; see :meth:`read`."""
        return self.read(self.exchange.stream(self.messages))

    def read(self, arriving: Iterable[Message]) -> Iterator[Reply]:
        """Yield the good replies in client-id order; note the others in :attr:`failures`.

        A reply that is early waits undecoded, so that sums do not depend on which node was faster. A reply's vectors
        may lie in memory that the next exchange writes over: who keeps one past this loop copies it.
        """
        order = sorted(self.jobs)
        arrived: dict[int, RecordDict] = {}
        position = 0
        for reply in arriving:
            # Flower gives a message its id when it is sent, which may be as late as the first reply.
            asked = reply.metadata.reply_to_message_id
            node, share = next(
                (
                    (sent.metadata.dst_node_id, share)
                    for sent, share in self.shares
                    if sent.metadata.message_id == asked
                ),
                (0, ()),
            )
            if reply.has_error():
                self.exchange.nodes.lost(node)
            for job in share:
                if reply.has_error():
                    self.fail(job.client, last_line(reply.error.reason))
                else:
                    arrived[job.client] = reply.content
            while position < len(order) and (order[position] in arrived or order[position] in self.failures):
                yield from self._decode(self.jobs[order[position]], arrived.pop(order[position], None))
                position += 1
        for client in order[position:]:
            if client not in arrived and client not in self.failures:
                self.late.append(client)
                self.fail(client, self.exchange.why_late)
            yield from self._decode(self.jobs[client], arrived.pop(client, None))
        self.exchange.reusable = not self.failures
        self.exchange.when_read(self)

    def reject(self, client: int, reason: str) -> None:
        """Note that a reply could not be used."""
        self.fail(client, f"bad reply: {reason}")

    def fail(self, client: int, reason: str) -> None:
        """Note that a client failed."""
        self.failures[client] = reason
        self.exchange.held.forget(client)
        log.warning("client %d: %s", client, reason)

    def _decode(self, job: Job, content: RecordDict | None) -> Iterator[Reply]:
        if content is None:
            return
        transport = self.transports[job.client]
        expected = {name: self.size_of(name) for name in job.returns}
        try:
            with self.exchange.coding():
                reply = decode_reply(content, job.client, expected, transport)
        except BadReply as error:
            self.reject(job.client, str(error))
            return
        if reply.error:
            self.fail(job.client, reply.error)
            return
        self.exchange.count_up(reply, transport)
        yield reply


class Exchange:
    """Hands jobs out over the SuperNodes, one exchange after the other.

    Attributes:
        nodes: the SuperNodes.
        facts: what every request carries: digest of the common expert, architectures of the experts.
        traffic: what the clients of the run cost so far.
        held: which vectors each deployed client has already.
        coding_seconds: spent on encoding and decoding.
        moved: bytes that all exchanges so far physically moved, the ones that no result counts too.
        sent: how many jobs were sent by each transport.
        deadline: seconds of one exchange.
        when_read: is told of each exchange whose replies were read to their end.
        why_late: what to say of who did not answer in the last one.
        reusable: nobody reads the last exchange's shared memory any more, and it may be written over.
    """

    def __init__(
        self, grid: Grid, config: Config, common: CommonExpert, facts: Mapping[str, str], binding: Binding | None = None
    ) -> None:
        self.config, self.common = config, common
        self.facts = {"common-expert": common.digest, **facts}
        self.traffic = Traffic()
        self.when_read: Callable[[PendingExchange], None] = lambda pending: None
        self.coding_seconds = 0.0
        self.moved = 0
        self.sent: Counter[str] = Counter()
        self.held = VectorLedger()
        self.deadline, self.reusable, self.why_late = config.limits.exchange_seconds, False, ""
        self._grid = grid
        self._shared = None if config.transport.name == "inline" else SharedFolder()
        folder = str(self._shared.path) if self._shared else ""
        told = {"common-expert": common.digest, "shared-folder": folder}
        told |= {key: facts.get(key, "") for key in ("private", "settings")}
        self.nodes = Nodes(grid, told, binding)

    def wait_for_nodes(self, clients: Iterable[int]) -> None:
        """Return when the nodes host ``clients``, or enough of them (see :meth:`Nodes.wait_for`)."""
        self.nodes.wait_for(clients, self.config.limits)

    def request(
        self,
        kind: str,
        server_round: int,
        jobs: Iterable[Job],
        vectors: Mapping[str, Tensor],
        size_of: SizeOf,
        served: bool = False,
    ) -> PendingExchange:
        """Return an exchange that is ready to be sent.

        Args:
            kind: Flower's message type, with the action.
            server_round: of the run.
            jobs: at most one for a client.
            vectors: what jobs may name.
            size_of: of the vectors that the replies must hold.
            served: whether clients get the vectors for predictions of their own; unseen ones get none for another end.
        """
        jobs = list(jobs)
        pending = PendingExchange(self, size_of, kind, server_round, jobs={job.client: job for job in jobs})
        with self.coding():
            encode = self._encoder(jobs, vectors, size_of)
            self.reusable = False
            shares, homeless = self.nodes.hand_out(jobs)
            for client in homeless:
                pending.fail(client, "no SuperNode hosts this client")
            for node, share in shares.items():
                host = self.nodes.hosts[node]
                versions, missing = self._count_down(share, vectors, served)
                names = sorted(versions if host.any_client else missing)
                transport, arrays = encode(host, names)
                keep = {} if host.any_client else versions
                content = encode_request(server_round, self.facts | transport.facts(), share, arrays, keep)
                if not host.has_common_expert:
                    content["common-expert"] = ArrayRecord({"safetensors": byte_array(self.common.as_bytes)})
                    self._move(len(self.common.as_bytes))
                    self.nodes.got_common_expert(node)
                self._move(sum(len(array.data) for array in arrays.values()))
                message = Message(content, node, kind, ttl=self.deadline)  # nobody starts on what is given up
                pending.messages.append(message)
                pending.shares.append((message, share))
                pending.transports |= {job.client: transport for job in share}
                self.sent["inline" if isinstance(transport, Inline) else "shared"] += len(share)
        return pending

    def _count_down(
        self, share: Sequence[Job], vectors: Mapping[str, Tensor], served: bool
    ) -> tuple[dict[str, str], set[str]]:
        """Note what goes to each client; return the versions of a node's vectors, and the names not held there."""
        versions = {n: self.held.version(n, vectors[n]) for job in share for n in job.vectors}
        everything: set[str] = set()
        for job in share:
            # Of experts that a client chooses from it receives those that it chooses.
            names = [name for name in job.vectors if not (job.choose and expert_ids([name]))]
            everything.update(self.count_down(job.client, names, vectors, served))
        return versions, everything

    def count_down(
        self, client: int, names: Iterable[str], vectors: Mapping[str, Tensor], served: bool = False
    ) -> Sequence[str]:
        """Note what a client receives; return what of it the client does not hold yet."""
        wanted = {name: self.held.version(name, vectors[name]) for name in names}
        missing = self.held.missing(client, wanted)
        count = sum(self._width * vectors[name].numel() for name in missing)
        if served or client >= self.config.partition.clients:
            self.traffic.served += count
        else:
            self.traffic.down += count
        self.held.sent(client, wanted)
        return missing

    @property
    def _width(self) -> int:
        """Bytes of a number on the wire."""
        return WIDTHS[self.config.transport.dtype]

    @property
    def shares_memory(self) -> bool:
        """Whether what is in the server's memory costs nothing to read at any node: all simulate clients there."""
        hosts = self.nodes.hosts.values()
        return bool(hosts) and all(host.any_client and self._sees_shared(host) for host in hosts)

    def _sees_shared(self, host: Host) -> bool:
        return self._shared is not None and host.shared_token == self._shared.token

    def _encoder(
        self, jobs: Sequence[Job], vectors: Mapping[str, Tensor], size_of: SizeOf
    ) -> Callable[[Host, Sequence[str]], tuple[Transport, dict[str, Array]]]:
        """Return what encodes vectors for a node, each vector once per transport."""
        shared, inline = self._shared_for(jobs, vectors, size_of), Inline(self.config.transport.dtype)
        encoded: dict[tuple[Transport, str], Array] = {}

        def encode(host: Host, names: Sequence[str]) -> tuple[Transport, dict[str, Array]]:
            if self.config.transport.name == "shared" and not self._sees_shared(host):
                raise FedjetsError(
                    "transport.name = 'shared': a SuperNode does not see the server's memory; set 'auto'"
                )
            choices: list[Transport] = [shared, inline] if shared and self._sees_shared(host) else [inline]
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

    def stream(self, messages: Sequence[Message]) -> Iterator[Message]:
        """Send, and yield replies as they arrive, until all are there, the deadline has passed, or enough are there.

        Enough is ``limits.enough-share`` of the nodes, and ``limits.grace-seconds`` for the others after that.
        """
        limits = self.config.limits
        wanted, good, since = enough(limits.enough_share, len(messages)), 0, math.inf
        self.why_late = f"no reply within limits.exchange-seconds = {self.deadline:g}"

        def settled() -> bool:
            if not time.monotonic() > since + limits.grace_seconds:
                return False
            self.why_late = f"no reply limits.grace-seconds = {limits.grace_seconds:g} after {good} others"
            return True

        for reply in stream(self._grid, messages, self.deadline, settled):
            good += not reply.has_error()
            if good == wanted:
                since = min(since, time.monotonic())
            yield reply

    def count_up(self, reply: Reply, transport: Transport) -> None:
        """Count what a reply cost."""
        self.traffic.up += reply.bytes_up
        self._move(reply.bytes_up if isinstance(transport, Inline) else 0)

    def _move(self, count: int) -> None:
        self.traffic.wire += count
        self.moved += count

    def _shared_for(self, jobs: Sequence[Job], vectors: Mapping[str, Tensor], size_of: SizeOf) -> Shared | None:
        """Return the shared transport of this exchange, if all that travels fits in the memory."""
        if self._shared is None:
            return None
        sizes = {name: vectors[name].numel() for job in jobs for name in job.vectors}
        sizes |= {f"{job.client}.{name}": size_of(name) for job in jobs for name in job.returns}
        sizes = {name: self._width * size for name, size in sizes.items()}
        shared = self._shared.begin(sizes, self.config.transport.dtype, reuse=self.reusable)
        if shared is None and self.config.transport.name == "shared":
            raise FedjetsError(f"transport.name = 'shared': no room for {sum(sizes.values())} bytes; set 'auto'")
        return shared

    @contextmanager
    def coding(self) -> Iterator[None]:
        """Count the seconds of encoding and decoding."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.coding_seconds += time.monotonic() - start

    def close(self) -> None:
        """Delete what lies in shared memory."""
        if self._shared is not None:
            self._shared.close()
