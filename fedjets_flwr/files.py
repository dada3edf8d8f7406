"""Files: the ways to name them, and the one way to write them."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
