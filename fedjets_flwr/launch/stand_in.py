"""A command of ours in the place of ``flwr-simulation``, by which SuperExec starts a simulation."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

COMMAND = "flwr-simulation"


def stand_in(words: Sequence[str], folder: Path, path: str) -> str:
    """Return a path of commands on which one of ours is found instead of Flower's.

    Args:
        words: of the command line of Python that get the arguments of ``flwr-simulation``, too.
        folder: takes the command.
        path: on which all other commands are found.

    Returns:
        The same path where the folder's file system runs no programs (``noexec``).
    """
    (folder / "commands").mkdir()
    command = folder / "commands" / COMMAND
    command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
    command.chmod(0o700)
    return f"{command.parent}{os.pathsep}{path}" if os.access(command, os.X_OK) else path
