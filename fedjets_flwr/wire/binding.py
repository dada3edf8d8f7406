"""Which SuperNode speaks for which client: public keys, which Flower has every site prove, bound to client ids."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.proto.node_pb2 import NodeInfo

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.names import ROLES

PINS = "pins.json"
"""The file in a run's folder that keeps the keys of clients that were pinned at first sight."""


def fingerprint(public_key: bytes | str) -> str:
    """Return the SHA-256 of a public key in hex, however it is written: PEM, as Flower keeps it, or OpenSSH.

    Raises:
        ValueError: it is no public key.
    """
    data = public_key.encode() if isinstance(public_key, str) else public_key
    load = serialization.load_pem_public_key if data.startswith(b"-----") else serialization.load_ssh_public_key
    try:
        key = load(data)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def key_of(node: NodeInfo) -> str:
    """Return what a SuperNode is known by: its key's fingerprint, or its id where it has no key, as in a simulation."""
    try:
        return fingerprint(node.public_key)
    except ValueError:
        return f"node {node.node_id}"


def roster_line(client: int, role: str, public_key: str) -> str:
    """Return a line of a roster: a client's id, its role and its public key in OpenSSH's form."""
    return f"{client} {role} {public_key.strip()}\n"


def read_roster(config: Config) -> dict[str, int] | None:
    """Return the client id of every key in the file ``nodes.roster``; None where the settings name no file.

    Raises:
        FedjetsError: it cannot be read, or a line of it is none; names the line.
    """
    if not config.nodes.roster:
        return None
    path = Path(config.nodes.roster).expanduser()
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise FedjetsError(f"nodes.roster = {config.nodes.roster!r}: cannot be read ({error})") from None
    clients: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        key, client = _entry(line, f"nodes.roster = {config.nodes.roster!r}, line {number}", config)
        if key in clients or client in clients.values():
            raise FedjetsError(f"nodes.roster = {config.nodes.roster!r}, line {number}: listed twice")
        clients[key] = client
    return clients


def _entry(line: str, where: str, config: Config) -> tuple[str, int]:
    client, role, key = [*line.split(maxsplit=2), "", ""][:3]
    total = config.partition.all_clients
    if not client.isdecimal() or int(client) >= total or role not in ROLES:
        raise FedjetsError(f"{where}: not 'client-id {'|'.join(ROLES)} public-key' with an id from 0 to {total - 1}")
    fits = config.partition.role_of(int(client))
    if role != fits:
        raise FedjetsError(f"{where}: client {client} is {fits} by partition.clients and others, not {role}")
    try:
        return fingerprint(key), int(client)
    except ValueError:
        raise FedjetsError(f"{where}: no public key such as site-{client}.pub of `fedjets credentials`") from None


class Binding:
    """Which key may speak for which client.

    By a roster; without one, the key that first claims a client keeps it, for the run and its resumes.
    """

    def __init__(self, roster: Mapping[str, int] | None = None, pins: Path | None = None, resume: bool = False) -> None:
        self._roster, self._file = roster, pins
        self._pins: dict[int, str] = {}
        if pins is not None and resume and pins.is_file():
            self._pins = _read_pins(pins)

    def refusal(self, key: str, clients: Iterable[int]) -> str:
        """Return why a key may not speak for clients, or nothing, and keep them for it."""
        for client in clients:
            if self._roster is not None and self._roster.get(key) != client:
                return f"it claims client {client}, which nodes.roster does not give to its key"
            if self._roster is None and self._pins.get(client, key) != key:
                return f"it claims client {client}, which another key had before"
        if new := {client: key for client in clients if self._pins.get(client) != key}:
            self._pins |= new
            self._write()
        return ""

    def _write(self) -> None:
        if self._file is not None:
            with written(self._file) as file:
                file.write_text(json.dumps({str(client): key for client, key in sorted(self._pins.items())}))


def _read_pins(path: Path) -> dict[int, str]:
    try:
        return {int(client): str(key) for client, key in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise FedjetsError(f"{path}: damaged ({error}); delete it to pin the keys of the sites anew") from None
