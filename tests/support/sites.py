"""Deployed sites in this process: a node for each client, known by its key, some of them hostile or slow."""

from collections.abc import Iterable
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from tests.support.in_process import InProcessGrid


def new_key() -> bytes:
    """Return a public key as Flower keeps it."""
    return public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())


class Site:
    """A SuperNode: its key, its ``--node-config``, and which messages it does not answer, or answers with an error."""

    def __init__(self, client: int, key: bytes | None = None) -> None:
        self.config: dict[str, Scalar] = {"client-id": client}
        self.key = key or new_key()
        self.silent: set[str] = set()
        self.failing: set[str] = set()


class SiteGrid(InProcessGrid):
    """One node for each client of the run; tests change :attr:`sites` by node id before or between messages."""

    simulated = False
    latest: ClassVar["SiteGrid"]

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        SiteGrid.latest = self
        total = config.partition.clients + config.partition.unseen_clients
        self.sites = {100 + client: Site(client) for client in range(total)}
        self.kinds: list[tuple[int, str]] = []
        self.begin()

    def begin(self) -> None:
        """Change the sites before the run."""

    def before(self, message: Message) -> None:
        """Change the sites before a message reaches one."""

    def get_node_ids(self) -> list[int]:
        return sorted(self.sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=site.key) for node, site in sorted(self.sites.items())]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            self.before(message)
            site = self.sites[node]
            self.kinds.append((node, kind))
            own = {"cache-dir": str(self.config.cache_dir / f"site{site.config['client-id']}")} | site.config
            self.context = Context(1, node, own, RecordDict(), self.config.flat())
            ids += super().push_messages([message])
            name = ids[-1]
            if kind in site.silent:
                self.replies.pop(name)
            if kind in site.failing:
                failed = Message(Error(1, "it broke"), reply_to=self.replies[name])
                vars(failed.metadata).update(_reply_to_message_id=name)
                self.replies[name] = failed
        return ids

    def answer(self, message: Message) -> Message:
        try:
            return super().answer(message)
        except FedjetsError as error:  # Flower sends a ClientApp's exception to the server
            return Message(Error(1, f"{type(error).__name__}: {error}"), reply_to=message)

    def change(self, reply: Message) -> Message:
        vars(reply.metadata).update(_src_node_id=self.context.node_id)
        return reply
