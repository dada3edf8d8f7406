"""What a client keeps between rounds and never sends: named tensors on its own disk, by run, client and round.

A file is named after the round, and the stage of the round, that wrote it. A round reads the newest one before it, so
a resumed run reads what its checkpoint's round left, whatever a run that was cut off wrote later. Files of a run that
was started afresh in the same folder have another start in their path.
"""

import re
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import safetensors.torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.runs.private_folder import START, private_folder

TRAINED, ADAPTED = 0, 1
"""Stages of a round: what training leaves, and what adapting before the round's evaluation does after it."""
_NAME = re.compile(r"round-(\d{6})-([01])\.safetensors")

When = tuple[int, int]
"""(round, stage)."""


class ClientState:
    """The private tensors of one client at one stage of a round."""

    def __init__(self, config: Config, start: str, client: int, when: When) -> None:
        """Take the state that ``start`` names.

        Args:
            config: the settings; files lie below ``run.cache-dir``.
            start: ``<run>/<start>`` as the server has it.
            client: whose.
            when: the round and stage that are being done.

        Raises:
            FedjetsError: the server sent a malformed start.
        """
        if not START.fullmatch(start):
            raise FedjetsError("the server sent a malformed name of this run's private state")
        run, own = start.split("/")
        self._config, self._when = config, when
        self._folder = private_folder(config, run) / f"client-{client}" / own

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """What the client kept last, on the CPU; nothing at first."""
        before = [(when, path) for when, path in self._files() if when < self._when]
        return dict(safetensors.torch.load(before[-1][1].read_bytes())) if before else {}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in place of the last ones, in one step; delete what no checkpoint can ask for any more."""
        number, stage = self._when
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for other in self._folder.parent.iterdir():
            if other != self._folder:
                shutil.rmtree(other, ignore_errors=True)
        with written(self._folder / f"round-{number:06d}-{stage}.safetensors", durable=True) as file:
            file.write_bytes(safetensors.torch.save({name: t.detach().cpu() for name, t in tensors.items()}))
        for _, path in self._unasked():
            path.unlink(missing_ok=True)

    def _unasked(self) -> list[tuple[When, Path]]:
        """Return files of rounds to come, which a run that was cut off wrote, and those older than all checkpoints.

        The server keeps so many checkpoints, one every so many rounds. The newest file before the oldest of them is the
        state of its round.
        """
        run, files = self._config.run, self._files()
        last = (self._when[0] - 1) // run.checkpoint_every
        oldest = (last - run.keep_checkpoints + 1) * run.checkpoint_every
        old = [(when, path) for when, path in files if when[0] <= oldest]
        return old[:-1] + [(when, path) for when, path in files if when > self._when]

    def _files(self) -> list[tuple[When, Path]]:
        """Return what is there, the oldest first."""
        paths = self._folder.iterdir() if self._folder.is_dir() else ()
        found = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name))]
        return sorted(((int(match[1]), int(match[2])), path) for match, path in found)
