"""Where the clients of a run keep what they never send, and how the server knows that they all see one folder."""

import hashlib
import re
import secrets
from contextlib import suppress
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written

START = re.compile(r"([0-9a-f]{32})/([0-9a-f]{32})")
"""What names the state of one run from one start on."""


def new_start(config: Config) -> str:
    """Return a name for the state of a run that begins afresh."""
    run = hashlib.sha256(f"{config.identity()} {config.run_dir}".encode()).hexdigest()[:32]
    return f"{run}/{secrets.token_hex(16)}"


def private_folder(config: Config, run: str) -> Path:
    """Return the folder of a run's clients on this machine."""
    return config.cache_dir / "private" / run


def leave_mark(config: Config, start: str) -> None:
    """Write what :func:`read_mark` reads, for a simulation, whose nodes must all see the server's folder."""
    run, own = start.split("/")
    folder = private_folder(config, run)
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with written(folder / "mark") as file:
        file.write_text(own)


def read_mark(config: Config, start: str) -> bool:
    """Return whether the mark of a start lies here."""
    if START.fullmatch(start):
        run, own = start.split("/")
        with suppress(OSError, UnicodeDecodeError):
            return (private_folder(config, run) / "mark").read_text() == own
    return False


def check_seen(config: Config, seen: bool) -> None:
    """Raise FedjetsError unless all nodes of a simulation saw the mark."""
    if not seen:
        raise FedjetsError(
            f"run.cache-dir = {str(config.cache_dir)!r}: nodes of the simulation do not see this folder of the server,"
            f" where the clients of strategy.name = {config.strategy.name!r} keep their private state; set one that all"
            " share"
        )
