"""The message schema: what the server asks of clients and what they reply.

One Flower message carries the jobs of all clients that one SuperNode runs in an exchange. Vectors that several of them
need travel once. Everything is keyed by client id, never by Flower's random node id.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import choice_name, expert_ids, expert_name
from fedjets_flwr.printable import one_line
from fedjets_flwr.wire.transport import WIDTHS, Inline, Transport, transport_of
from fedjets_flwr.wire.vector_cache import VectorStore, versions_of

VERSION = 3
LARGEST = 1e308
"""Numbers of replies lie between minus this and this, which NaN does not."""
Number = int | float | list[int] | list[float]


class BadReply(FedjetsError):
    """A reply that must not be used; its text is the reason, one printable line whatever the reply holds."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


@dataclass(frozen=True)
class Job:
    """What one client is asked in one exchange.

    Attributes:
        client: client id.
        vectors: names of the vectors that it receives, e.g. ``expert.3`` and ``gate``.
        returns: names of the vectors that its reply must hold.
        numbers: small integers of the method, by name; under ``choose`` how many of the experts that lie ready the
            client chooses itself, and receives.
        cost: expected work in any unit; the longest job is handed out first.
    """

    client: int
    vectors: tuple[str, ...] = ()
    returns: tuple[str, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict)
    cost: float = 1.0

    @property
    def experts(self) -> tuple[int, ...]:
        """Ids of the experts among the vectors."""
        return expert_ids(self.vectors)

    @property
    def choose(self) -> int:
        """How many experts the client chooses itself; 0: it receives what the job names."""
        return self.numbers.get("choose", 0)

    def chosen(self, experts: Sequence[int]) -> "Job":
        """Return the job that it is once the client chose, best first."""
        shared = tuple(name for name in self.vectors if not expert_ids([name]))
        slots = {choice_name(place): expert_name(m) for place, m in enumerate(experts)}
        returns = tuple(slots.get(name, name) for name in self.returns)
        numbers = {name: number for name, number in self.numbers.items() if name != "choose"}
        return replace(self, vectors=(*slots.values(), *shared), returns=returns, numbers=numbers)


@dataclass(frozen=True)
class Head:
    """What a request asks, without the vectors that it brings."""

    server_round: int
    facts: Mapping[str, str]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Request(Head):
    """A decoded request as a client's process sees it."""

    vectors: Mapping[str, Tensor]
    transport: Transport


@dataclass(frozen=True)
class Reply:
    """What one client answered: its vectors, its numbers, or why it could not."""

    client: int
    vectors: Mapping[str, Tensor]
    numbers: Mapping[str, Number]
    error: str = ""
    bytes_up: int = 0

    def integers(self, name: str, length: int | None = None, most: int | None = None) -> list[int]:
        """Return a list of integers of the reply, of a given length, each from 0 to ``most``.

        Raises:
            BadReply: missing, not integers, of another length, or out of range.
        """
        value = self.numbers.get(name)
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise BadReply(f"{name}: expected integers")
        if length is not None and len(value) != length:
            raise BadReply(f"{name}: expected {length} values, got {len(value)}")
        if most is not None and not all(0 <= v <= most for v in value):
            raise BadReply(f"{name}: expected values from 0 to {most}")
        return [int(v) for v in value]

    def count(self, name: str, most: int) -> int:
        """Return an integer of the reply from 0 to ``most``.

        Raises:
            BadReply: missing, not an integer, or out of range.
        """
        value = self.numbers.get(name)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise BadReply(f"{name}: expected an integer from 0 to {most}")
        return value

    def number(self, name: str) -> float:
        """Return a finite number of the reply.

        Raises:
            BadReply: missing or not finite.
        """
        value = self.numbers.get(name)
        if not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
            raise BadReply(f"{name}: expected a finite number")
        return value


def encode_request(
    server_round: int,
    facts: Mapping[str, str],
    jobs: Iterable[Job],
    arrays: Mapping[str, Array],
    keep: Mapping[str, str] | None = None,
) -> RecordDict:
    """Return the content of a message that carries ``jobs`` and encoded vectors, each one once.

    ``keep``: versions of all vectors that the jobs name, for a node that keeps them; those it holds need no array.
    """
    jobs = list(jobs)
    content = RecordDict(
        {
            "request": ConfigRecord(
                {"version": VERSION, "round": server_round, "clients": [job.client for job in jobs], **facts}
            )
        }
    )
    for job in jobs:
        content[f"client.{job.client}"] = ConfigRecord({"vectors": list(job.vectors), **job.numbers})
    names = sorted(arrays.keys() & {name for job in jobs for name in job.vectors})
    content["vectors"] = ArrayRecord({name: arrays[name] for name in names})
    content["keep"] = ConfigRecord({"versions": [f"{name}@{version}" for name, version in (keep or {}).items()]})
    return content


def decode_head(content: RecordDict) -> Head:
    """Return what a message asks of whom; no vector is looked at.

    Raises:
        FedjetsError: the server speaks another version.
    """
    head = dict(content.config_records["request"])
    if head.pop("version") != VERSION:
        raise FedjetsError("the server speaks another version of the message schema; install the same release")
    server_round, clients = int(head.pop("round")), head.pop("clients")  # type: ignore[arg-type]
    jobs = []
    for client in map(int, clients):  # type: ignore[arg-type]
        record = dict(_record(content, f"client.{client}", ConfigRecord) or {})
        names = tuple(str(name) for name in record.pop("vectors"))  # type: ignore[union-attr]
        jobs.append(Job(client, names, numbers={k: int(v) for k, v in record.items()}))  # type: ignore[arg-type]
    return Head(server_round, {k: str(v) for k, v in head.items()}, tuple(jobs))


def bytes_of(content: RecordDict) -> int:
    """Return how many bytes of vectors, and of a common expert, a message brings."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def decode_request(content: RecordDict, store: VectorStore | None = None) -> Request:
    """Return what a message asks, with the vectors.

    Args:
        content: the message's.
        store: where this site keeps vectors; in a simulation there is none, and everything comes along.

    Raises:
        FedjetsError: the server speaks another version, or takes this site to hold what it lost.
    """
    head = decode_head(content)
    transport = transport_of(head.facts)
    vectors = {name: transport.decode(name, array) for name, array in content.array_records["vectors"].items()}
    keep = versions_of(map(str, content.config_records["keep"]["versions"]))  # type: ignore[arg-type]
    if store is not None:
        vectors |= _kept(store, keep, vectors)
    return Request(head.server_round, head.facts, head.jobs, vectors, transport)


def _kept(store: VectorStore, versions: Mapping[str, str], received: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep what was received; return what was not, from the store."""
    found = {}
    for name, version in versions.items():
        if name in received:
            store.put(name, version, received[name])
        elif (held := store.get(name, version)) is not None:
            found[name] = held
        else:
            raise FedjetsError(f"{name} is no longer in {store.folder}; the server will send it again")
    return found


Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def _record(content: RecordDict, name: str, kind: type[Record]) -> Record | None:
    """Return a record, or None if there is none of this kind.

    Not by Flower's ``config_records`` and its like: each looks at all records, as many as a message has clients.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else None


def encode_replies(replies: Iterable[Reply], transport: Transport | None = None) -> RecordDict:
    """Return the content of a message that carries the replies of all clients of one SuperNode."""
    transport = transport or Inline()
    content = RecordDict({"reply": ConfigRecord({"version": VERSION})})
    arrays = ArrayRecord()
    for reply in replies:
        content[f"client.{reply.client}"] = MetricRecord(dict(reply.numbers))
        if reply.error:
            content[f"error.{reply.client}"] = ConfigRecord({"reason": reply.error})
        for name, vector in reply.vectors.items():
            arrays[f"{reply.client}.{name}"] = transport.encode(f"{reply.client}.{name}", vector)
    content["vectors"] = arrays
    return content


def decode_reply(
    content: RecordDict, client: int, expected: Mapping[str, int], transport: Transport | None = None
) -> Reply:
    """Return one client's reply out of its node's; other clients' parts stay undecoded.

    Args:
        content: a reply, data from outside.
        client: whose reply.
        expected: the vectors that must be there, with their sizes.
        transport: how they came; default: inside the message.

    Raises:
        BadReply: the reason why it must not be used.
    """
    head = _record(content, "reply", ConfigRecord)
    if head is None or head.get("version") != VERSION:
        raise BadReply("another version of the message schema")
    if (failed := _record(content, f"error.{client}", ConfigRecord)) is not None:
        return Reply(client, {}, {}, error=one_line(str(failed.get("reason", ""))) or "no reason")
    if (numbers := _record(content, f"client.{client}", MetricRecord)) is None:
        raise BadReply("no part of this client in its node's reply")
    transport = transport or Inline()
    arrays = _record(content, "vectors", ArrayRecord) or ArrayRecord()
    vectors = {}
    for name, size in expected.items():
        array = arrays.get(f"{client}.{name}")
        if array is None:
            raise BadReply(f"{name} is missing")
        try:
            vectors[name] = transport.decode(f"{client}.{name}", array, size)
        except ValueError as error:
            raise BadReply(str(error)) from None
    return Reply(client, vectors, dict(numbers), bytes_up=WIDTHS[transport.dtype] * sum(expected.values()))
