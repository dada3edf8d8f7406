"""How a run is stopped before its end, so that its last finished round is kept.

The launcher leaves a request in the run folder; the ServerApp, which looks there while it waits for clients, writes a
checkpoint and ends. A request names the run by Flower's id of it: one that came too late never stops the next run.
"""

import os
import traceback
from pathlib import Path

from fedjets_flwr.errors import FedjetsError


class Parent:
    """The process that started this one, and is the first to go when its launcher goes."""

    def __init__(self) -> None:
        self._pid = os.getppid()

    def gone(self) -> bool:
        """Return whether it ended."""
        return os.getppid() != self._pid


class Stopped(FedjetsError):
    """The run was asked to stop."""

    def __init__(self) -> None:
        super().__init__("stopped; go on with --resume")


class StopRequest:
    """The request to stop one run."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self._path, self._run_id = request_file(folder), run_id

    def make(self) -> None:
        """Ask for it."""
        self._path.write_text(self._run_id)

    def made(self) -> bool:
        """Return whether this very run was asked to stop."""
        try:
            return self._path.read_text() == self._run_id
        except (OSError, UnicodeDecodeError):
            return False


def request_file(folder: Path) -> Path:
    """Return where the request of a run folder lies."""
    return folder / ".stop"


def error_facts(error: BaseException, asked: bool = False) -> dict[str, object]:
    """Return what ``error.json`` says of a run that an exception ended.

    Args:
        error: what ended it; Flower stops a deployed ServerApp by SystemExit.
        asked: whether the run was asked to stop: what breaks afterwards is part of that.
    """
    if asked or isinstance(error, (Stopped, SystemExit)):
        return {"status": "stopped", "reason": str(Stopped()), "expected": True}
    expected = isinstance(error, FedjetsError)
    reason = str(error) if expected else "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": reason, "expected": expected}
