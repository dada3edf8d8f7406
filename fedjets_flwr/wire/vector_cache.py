"""Vectors that a client holds already, so that they are not sent again.

The server gives every vector a version and notes which versions it sent to whom; a deployed site keeps what it
received on its disk, since each message there meets a new process. What fails is forgotten and sent again.
"""

import hashlib
import re
import secrets
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedjets_flwr.files import written

_FILE = re.compile(r"([a-z0-9.-]+)@([0-9a-f]{16}-\d{1,12})")

DIGEST_BYTES = 32


class VectorLedger:
    """The server's ledger. A version stands for one tensor object: a state that changes gets a new one."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(8)
        self._versions: dict[str, tuple[weakref.ref[Tensor], str]] = {}
        self._count = 0
        self._held: defaultdict[int, dict[str, str]] = defaultdict(dict)

    def version(self, name: str, vector: Tensor) -> str:
        """Return the version of a vector: the same as long as it is the same object."""
        known = self._versions.get(name)
        if known is None or known[0]() is not vector:
            self._count += 1
            known = self._versions[name] = (weakref.ref(vector), f"{self._run}-{self._count}")
        return known[1]

    def missing(self, client: int, versions: Mapping[str, str]) -> list[str]:
        """Return the names of the vectors that a client does not hold in these versions."""
        held = self._held[client]
        return [name for name, version in versions.items() if held.get(name) != version]

    def sent(self, client: int, versions: Mapping[str, str]) -> None:
        """Note what is on its way to a client."""
        self._held[client] |= versions

    def held_by(self, clients: Iterable[int]) -> dict[int, dict[str, str]]:
        """Return the versions that clients hold, by name."""
        return {client: dict(self._held[client]) for client in clients}

    def restore(self, held: Mapping[int, Mapping[str, str]]) -> None:
        """Note that clients hold what :meth:`held_by` returned, and nothing that came since."""
        self._held |= {client: dict(versions) for client, versions in held.items()}

    def forget(self, client: int) -> None:
        """Note that a client may have lost all it held."""
        self._held.pop(client, None)


class VectorStore:
    """A site's folder of the vectors that it received, one version of each name.

    Raw float32 and their SHA-256; the server's word decides which version is meant, and a damaged file is not used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, version: str, vector: Tensor) -> None:
        """Keep a vector in place of its older versions and of all vectors of other runs.

        Raises:
            ValueError: name or version cannot be a file's name.
        """
        path = self._path(name, version)
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in list(self.folder.iterdir()):
            match = _FILE.fullmatch(old.name)
            if match is None or match[1] == name or match[2][:16] != version[:16]:
                old.unlink(missing_ok=True)
        data = vector.numpy().data
        with written(path) as file, file.open("wb") as target:
            target.write(data)
            target.write(hashlib.sha256(data).digest())

    def get(self, name: str, version: str) -> Tensor | None:
        """Return a private memory map of a kept vector, or None."""
        path = self._path(name, version)
        size = path.stat().st_size - DIGEST_BYTES if path.is_file() else 0
        if size <= 0 or size % 4:
            return None
        vector = torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.float32)
        with path.open("rb") as file:
            file.seek(size)
            wanted = file.read()
        return vector if hashlib.sha256(vector.numpy().data).digest() == wanted else None

    def _path(self, name: str, version: str) -> Path:
        if not _FILE.fullmatch(f"{name}@{version}"):
            raise ValueError(f"{name}@{version} cannot be a file name")
        return self.folder / f"{name}@{version}"


def versions_of(held: Iterable[str]) -> dict[str, str]:
    """Return the versions by name in a request's list of ``name@version``.

    Raises:
        ValueError: an entry is malformed.
    """
    found = {}
    for entry in held:
        match = _FILE.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is no name@version")
        found[match[1]] = match[2]
    return found
