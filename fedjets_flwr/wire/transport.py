"""How vectors travel: inside the message, or through files in shared memory for nodes on the server's machine.

Both carry raw little-endian float32 (or float16) with no header to parse, and give the same bits. For ``shared`` the
server names the folder, the files to read and the files to write; a reply names nothing.
"""

import fcntl
import mmap
import os
import re
import resource
import secrets
import shutil
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from flwr.app import Array
from torch import Tensor

INLINE, SHARED = "fedjets.raw", "fedjets.shared"
WIDTHS = {"float32": 4, "float16": 2}
"""Bytes of a number by ``transport.dtype``."""
_FOLDER = re.compile(r"fedjets-(\d+)-[0-9a-f]{16}")


class Transport(Protocol):
    """Turns named vectors into arrays of a message and back."""

    @property
    def dtype(self) -> str:
        """``float32`` or ``float16``: a key of :data:`WIDTHS`."""

    def facts(self) -> dict[str, str]:
        """Return what a request tells of this transport."""

    def encode(self, name: str, vector: Tensor) -> Array:
        """Return a float32 vector as an array of a message."""

    def decode(self, name: str, array: Array, size: int | None = None) -> Tensor:
        """Return the vector in an array, not to be written to.

        Raises:
            ValueError: it is not ``size`` floats, or not of this transport.
        """


@dataclass(frozen=True)
class Inline:
    """Vectors inside the message: one copy to encode, none to decode float32; works everywhere."""

    dtype: str = "float32"

    def facts(self) -> dict[str, str]:
        """Return the type of the numbers."""
        return {"dtype": self.dtype}

    def encode(self, name: str, vector: Tensor) -> Array:
        """Return an array that holds the bytes."""
        data = _numbers(vector, self.dtype).tobytes()
        return Array(dtype=self.dtype, shape=tuple(vector.shape), stype=INLINE, data=data)

    def decode(self, name: str, array: Array, size: int | None = None) -> Tensor:
        """Return a view of the array's bytes, or, of float16, a copy in float32."""
        width = WIDTHS[self.dtype]
        if array.stype != INLINE or array.dtype != self.dtype or len(array.data) % width:
            raise ValueError(f"{name} is {array.dtype} of {array.stype}, not raw {self.dtype}")
        if size is not None and len(array.data) != width * size:
            raise ValueError(f"{name} has {len(array.data)} bytes, not {width * size}")
        return _view(array.data, self.dtype).float()


@dataclass(frozen=True)
class Shared:
    """Vectors as files of one folder in shared memory: one copy to encode, none to decode float32.

    ``sequence`` sets one exchange's files apart from all others', so that no late client sees a file change. What was
    decoded must not be used after the exchange: the next one may write over the files.
    """

    folder: Path
    sequence: int
    dtype: str = "float32"

    def facts(self) -> dict[str, str]:
        """Return what a request tells of this transport."""
        return {"shared-folder": str(self.folder), "sequence": str(self.sequence), "dtype": self.dtype}

    def path(self, name: str) -> Path:
        """Return the file of a vector; names that are no plain words are refused."""
        if not re.fullmatch(r"[a-z0-9.-]+", name):
            raise ValueError(f"{name!r} cannot be a file name")
        return self.folder / f"{self.sequence}-{name}"

    def encode(self, name: str, vector: Tensor) -> Array:
        """Write the file, over one that is there, and return an array without bytes."""
        path = self.path(name)
        held = path.is_file() and path.stat().st_size == WIDTHS[self.dtype] * vector.numel()
        if (memory := _MAPS.open(path, writable=True) if held else None) is not None:
            _view(memory, self.dtype).copy_(vector.detach())
        else:  # not through a map: a full memory is an error of a write, and the end of a process that touches a map
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(_numbers(vector, self.dtype).data)
                file.truncate()
        return Array(dtype=self.dtype, shape=tuple(vector.shape), stype=SHARED, data=b"")

    def decode(self, name: str, array: Array, size: int | None = None) -> Tensor:
        """Return a view of the file's memory, float16 and what too many files hold as a copy; it outlives the file."""
        if array.stype != SHARED:
            raise ValueError(f"{name} is of {array.stype}, not in shared memory")
        path = self.path(name)
        try:
            held = path.stat().st_size
        except OSError:
            raise ValueError(f"{name} was not written") from None
        width = WIDTHS[self.dtype]
        if held % width or (size is not None and held != width * size):
            raise ValueError(f"{name} has {held} bytes, not {width * (size or 0)}")
        memory = _MAPS.open(path, writable=False)
        return _view(path.read_bytes() if memory is None else memory, self.dtype).float()


def _numbers(vector: Tensor, dtype: str) -> np.ndarray:
    assert vector.dtype == torch.float32 and vector.dim() == 1 and sys.byteorder == "little"
    return vector.detach().to(getattr(torch, dtype)).cpu().contiguous().numpy()


def _view(data: bytes | mmap.mmap, dtype: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where the view must not be written to
        return torch.from_numpy(np.frombuffer(data, dtype=dtype))


class _Maps:
    """This process's maps of shared files, kept as long as the files: a new map of a model costs more than its copy."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, bool], tuple[int, mmap.mmap]] = {}

    def open(self, path: Path, writable: bool) -> mmap.mmap | None:
        """Return the map of a file that is not empty, by what the file is, whatever its name was before.

        None: the process holds so many that it could soon open no more files.
        """
        file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        facts = os.fstat(file)
        key = (facts.st_dev, facts.st_ino, writable)  # no other file gets the number while this one is held open
        if key not in self._kept and self._has_room():
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._kept[key] = file, mmap.mmap(file, facts.st_size, access=access)
        else:
            os.close(file)
        return self._kept[key][1] if key in self._kept else None

    def _has_room(self) -> bool:
        """Return whether the maps, which take two descriptors each, leave others half of those that may be open."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return limit == resource.RLIM_INFINITY or len(self._kept) < limit // 4

    def forget_deleted(self) -> None:
        """Let go of the files that were deleted; their memory is free when the last vector in it is."""
        for key, (file, _) in list(self._kept.items()):
            if os.fstat(file).st_nlink == 0:
                os.close(file)
                del self._kept[key]


_MAPS = _Maps()


def byte_array(data: bytes) -> Array:
    """Return raw bytes as an array, which Flower sends in chunks where a message's text fields are sent whole."""
    return Array(dtype="uint8", shape=(len(data),), stype=INLINE, data=data)


class SharedFolder:
    """The server's folder in shared memory, mode 0700, gone after the run; leftovers of dead runs go first."""

    def __init__(self) -> None:
        parent = Path("/dev/shm")
        if not os.access(parent, os.W_OK):
            parent = Path(tempfile.gettempdir())
        for old in (*parent.glob("fedjets-*"), *parent.glob(".fedjets-*")):
            if _FOLDER.fullmatch(old.name.removeprefix(".")) and _abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
        self.path = parent / f"fedjets-{os.getpid()}-{secrets.token_hex(8)}"
        self._hidden = hidden = self.path.with_name(f".{self.path.name}")  # its name as it is made, and as it goes
        hidden.mkdir(mode=0o700)
        # Held while this run lives. Until then others would take the folder for abandoned, so the lock comes last.
        self._lock = (hidden / "new").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (hidden / "new").rename(hidden / "lock")
        self.token = secrets.token_hex(16)
        (hidden / "probe").write_text(self.token)
        hidden.rename(self.path)
        self._sequence = 0
        self._files: set[Path] = set()

    def begin(self, sizes: Mapping[str, int], dtype: str, reuse: bool) -> Shared | None:
        """Return the transport of the next exchange, or None if its files have no room.

        Args:
            sizes: bytes of every file that will be written, by the vector's name.
            dtype: of the numbers.
            reuse: nobody reads the last exchange's files any more: they are written over instead of deleted, since
                memory that is there costs a copy, and new memory about twice that.
        """
        self._sequence += 1
        transport = Shared(self.path, self._sequence, dtype)
        spare: defaultdict[tuple[bool, int], list[Path]] = defaultdict(list)
        for path in sorted(self.path.glob("*-*")):
            if reuse and path in self._files:  # not what a client wrote that was given up
                spare[_is_reply(path.name.partition("-")[2]), path.stat().st_size].append(path)
            else:
                path.unlink(missing_ok=True)
        _MAPS.forget_deleted()
        needed = 0
        for name, size in sizes.items():
            if fitting := spare[_is_reply(name), size]:
                fitting.pop().rename(transport.path(name))
            else:
                needed += size
        left = set(chain.from_iterable(spare.values()))
        if not self._has_room(needed):
            for path in left:
                path.unlink()
            _MAPS.forget_deleted()
            left = set()
        self._files = left | set(map(transport.path, sizes))
        return transport if self._has_room(needed) else None

    def _has_room(self, needed: int) -> bool:
        """Return whether ``needed`` bytes fit with some to spare (a container's /dev/shm is often 64 MB)."""
        return shutil.disk_usage(self.path).free > 1.5 * needed

    def close(self) -> None:
        """Delete the folder, out of the way of clients that still write."""
        with suppress(OSError):
            self.path.rename(self._hidden)
            shutil.rmtree(self._hidden, ignore_errors=True)
        self._lock.close()
        _MAPS.forget_deleted()


def _is_reply(name: str) -> bool:
    """Return whether a client writes this vector; its name begins with the client's id.

    Files keep their direction: every process then has maps of the few that it reads, and of the few that it writes.
    """
    return name[0].isdigit()


def _abandoned(folder: Path) -> bool:
    """Return whether no living run holds a folder."""
    try:
        with (folder / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        return not folder.name.startswith(".")  # else it is not locked yet, or just goes
    except OSError:
        return False  # held, or another user's


def probe(folder: str) -> str:
    """Return what a node reads in the server's folder, or an empty text if it sees no such folder."""
    path = Path(folder)
    with suppress(OSError, UnicodeDecodeError):
        if _FOLDER.fullmatch(path.name) and path.stat().st_uid == os.getuid():
            return (path / "probe").read_text()[:64]
    return ""


def transport_of(facts: Mapping[str, str]) -> Transport:
    """Return the transport that a request names.

    Raises:
        ValueError: it names a folder that is not the server's, or an unknown type of numbers.
    """
    dtype = facts.get("dtype", "float32")
    if dtype not in WIDTHS:
        raise ValueError(f"{dtype} is none of {', '.join(WIDTHS)}")
    if "shared-folder" not in facts:
        return Inline(dtype)
    _MAPS.forget_deleted()
    if not probe(facts["shared-folder"]):
        raise ValueError("the request names a folder that is no shared folder of a server here")
    return Shared(Path(facts["shared-folder"]), int(facts["sequence"]), dtype)
