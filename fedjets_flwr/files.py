"""Files: the ways to name them, and the one way to write them."""

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

StrPath = str | os.PathLike[str]
"""How a user may name a file or a folder."""


@contextmanager
def written(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a file beside ``path`` to write to, which then takes its place in one step.

    A reader sees the old bytes or the new ones, never half of them; where the block fails nothing changes. The folder
    is made if it is not there. ``durable``: the bytes are on the disk before.

    Raises:
        OSError: it cannot be written.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def locked(file: IO[str]) -> bool:
    """Lock a file, and return whether that was possible; where the disk knows no locks nobody else can, either."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def made_once(path: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Hold, during the block that makes a file, what keeps others from making it, too: they look again afterwards.

    The kernel lets go when a process dies; where it knows no locks, as on some network's disks, nobody is kept.

    Args:
        path: of the file.
        wait: called before a wait for another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        if not locked(file):
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits has it open, and finds the file made
