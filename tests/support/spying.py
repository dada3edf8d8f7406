"""What travels from clients to the server, byte by byte."""

from collections.abc import Collection, Iterable

from flwr.app import Message
from torch import Tensor

from tests.support.faults import clients_of
from tests.support.in_process import InProcessGrid


class Recording(InProcessGrid):
    """Keeps who answered what, and all arrays and numbers of the replies.

    Attributes:
        asked: (message type, clients) of each reply.
        heard: arrays and numbers, one after the other.
    """

    asked: list[tuple[str, list[int]]]
    heard: bytes

    def change(self, reply: Message) -> Message:
        """Keep what is in a reply; evaluations' counts apart, since they are of the clients' own models."""
        kind, content = reply.metadata.message_type, reply.content
        type(self).asked.append((kind, clients_of(content)))
        for record in content.array_records.values():
            type(self).heard += b"".join(array.data for array in record.values())
        if not kind.startswith("evaluate."):
            type(self).heard += repr([dict(record) for record in content.metric_records.values()]).encode()
        return reply


def recording() -> type[Recording]:
    """Return a grid that has heard nothing yet."""
    return type("Heard", (Recording,), {"asked": [], "heard": b""})


def check_unsent(grid: type[Recording], vectors: Iterable[Tensor], known: Collection[bytes] = ()) -> None:
    """Assert that no two numbers of private vectors that follow each other were sent; ``known``: pairs that may be."""
    for vector in vectors:
        pairs = {bytes(vector[i : i + 2].numpy()) for i in range(len(vector) - 1)}
        told = {pair for pair in pairs if len(set(pair)) > 1 and any(pair[:4]) and any(pair[4:])}
        assert len(told) > 10
        assert not {pair for pair in told - set(known) if pair in grid.heard}
