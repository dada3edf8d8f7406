"""An audit log: JSON lines, each with the SHA-256 of the line before it, appended and never written over.

So a line that was changed, cut out, put in or moved later is found, and one that was cut off at the end, by the newest
hash, which lies beside the log in ``<its name>.head``. Whoever may write both files can make all of them anew: who
wants to know even that notes the hash elsewhere. A line that a crash cut off in writing is no part of the chain.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from fedjets_flwr.errors import FedjetsError

AUDIT_LOG = "audit.jsonl"
"""The log's name, in a run's folder and in a site's cache."""
FIRST = "0" * 64
"""What stands for the line before the first one."""

log = logging.getLogger("flwr")


def head_of(path: Path) -> Path:
    """Return the file that holds the newest hash of a log."""
    return path.with_name(f"{path.name}.head")


def append(path: Path, what: str, facts: Mapping[str, object], durable: bool = False) -> None:
    """Append a line; other processes may do so at the same time.

    Args:
        path: the log; its folder is made if it is not there.
        what: what happened.
        facts: JSON about it.
        durable: all lines so far are on the disk when this returns; the others outlive a killed process all the same.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "rb+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before, whole = _end(file)
        if not whole:
            log.warning("%s: its last line was cut off in writing; the log goes on after it", path)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"before": before, "time": time, "what": what, **facts}, allow_nan=False).encode()
        file.write((b"" if whole else b"\n") + line + b"\n")
        if durable:
            os.fsync(file.fileno())
        with os.fdopen(os.open(head_of(path), os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as head:
            head.write(_hash(line).encode() + b"\n")


@dataclass(frozen=True)
class Verified:
    """A log whose chain is whole.

    Attributes:
        lines: of the chain.
        head: the newest hash.
        torn: numbers of the lines that were cut off in writing.
    """

    lines: int
    head: str
    torn: tuple[int, ...]


def verify(path: Path, noted: str = "") -> Verified:
    """Check a log from its first line to its last.

    Args:
        path: the log.
        noted: a hash of it that was noted before; default: the one beside it.

    Raises:
        FedjetsError: names the first line that does not fit, or says that the end is missing.
    """
    hashes, torn = [FIRST], []
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        noted = noted or head_of(path).read_text().strip()
    except (OSError, ValueError) as error:
        raise FedjetsError(f"{path}: cannot be verified ({error}); give --head HASH if its .head is lost") from None
    for number, line in enumerate(lines, 1):
        if (before := _before(line)) is None:
            if not _torn(line, hashes[-1]):
                raise FedjetsError(f"{path}: line {number} is none that a log begins: something was put in")
            torn.append(number)
        elif before != hashes[-1]:
            raise FedjetsError(f"{path}: line {number} does not follow from what is before it: something was changed")
        else:
            hashes.append(_hash(line))
    if noted not in hashes[1:]:
        raise FedjetsError(f"{path}: line {len(lines)} is not the end: the line of hash {noted[:64]} is missing")
    return Verified(len(hashes) - 1, hashes[-1], tuple(torn))


def _end(file: BinaryIO) -> tuple[str, bool]:
    """Return the hash of a log's last line that is whole, and whether nothing that is cut off follows it."""
    if not os.fstat(file.fileno()).st_size:
        return FIRST, True
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = next((line for line in _backwards(text) if _before(line) is not None), None)
        return FIRST if found is None else _hash(found), text[-1:] == b"\n"


def _backwards(text: mmap.mmap) -> Iterator[bytes]:
    """Yield the lines from the last to the first."""
    end = len(text)
    while end > 0:
        end -= text[end - 1 : end] == b"\n"
        start = text.rfind(b"\n", 0, end) + 1
        yield text[start:end]
        end = start


def _before(line: bytes) -> str | None:
    """Return the hash that a line has of the one before it; None of one that is cut off."""
    try:
        return str(json.loads(line)["before"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _torn(line: bytes, before: str) -> bool:
    """Return whether a crash can have left a line after the one of a hash: its beginning, or zeros of a lost block."""
    begun = json.dumps({"before": before}).encode()[:-1]
    return line.startswith(begun) or begun.startswith(line) or not line.strip(b"\0")


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
