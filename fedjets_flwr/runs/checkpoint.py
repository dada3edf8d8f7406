"""Checkpoints: vectors as safetensors, facts as JSON inside the same file, written in one step, the last n rounds kept.

A file's name carries the SHA-256 of its bytes, so a truncated or altered one is known before it is read.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import locked, written
from fedjets_flwr.release import code_digest
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.runs.claim import CHECKPOINTS, LOCK, forget_before, make_room, replaces
from fedjets_flwr.runs.score import improves

log = logging.getLogger("flwr")

_NAME = re.compile(r"round-(\d{6})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round."""

    server_round: int
    vectors: dict[str, Tensor]
    facts: dict[str, Any]


def newest_vectors(folder: Path) -> dict[str, Tensor]:
    """Return the state in the newest checkpoint whose bytes are whole, for reading only.

    Raises:
        FedjetsError: there is none.
    """
    for _, path in checkpoint_files(folder):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() in path.name:
            return dict(safetensors.torch.load(data))
    raise FedjetsError(f"{folder}: no whole checkpoint in it")


def checkpoint_name(server_round: int, data: bytes) -> str:
    """Return the name of a checkpoint's file, which tells its round and the digest of its bytes."""
    return f"round-{server_round:06d}-{hashlib.sha256(data).hexdigest()}.safetensors"


def checkpoint_files(folder: Path) -> list[tuple[int, Path]]:
    """Return (round, file) of the checkpoints in a folder, the newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


class RunLock:
    """Held by the one process that may write to a run's folder; the kernel lets go when it dies."""

    def __init__(self, config: Config, seconds: float | None = None) -> None:
        """Say how long to wait for a killed run's ServerApp, which may live on; else ``limits.lock-seconds``."""
        self._config, self._seconds = config, config.limits.lock_seconds if seconds is None else seconds

    def __enter__(self) -> "RunLock":
        """Take it.

        Raises:
            FedjetsError: another run still writes there after the wait.
        """
        self._file = (self._config.run_dir / LOCK).open("w")
        deadline = time.monotonic() + self._seconds
        while not locked(self._file):
            if time.monotonic() > deadline:
                raise FedjetsError(f"{self._config.run_dir}: another run writes there; stop it, or set run.name")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Checkpoints(Callback):
    """The ``checkpoints`` folder of a run, locked against a second writer for the life of this object.

    Raises:
        FedjetsError: another run writes there, or it holds results and the run neither resumes nor overwrites.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.run_dir / CHECKPOINTS
        config.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(config).__enter__()
        make_room(config)
        self.folder.mkdir(exist_ok=True)
        self._best: float | None = None
        self._whole: set[Path] = set()
        self.common, self.start = "", ""
        self.anchors: tuple[int, ...] = ()
        self.notes: Callable[[], Mapping[str, Any]] = dict
        for cut_off in self.folder.glob(".*"):
            cut_off.unlink()

    def close(self) -> None:
        """Let another run write there."""
        self._lock.__exit__()

    def on_round(self, record: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
        """Write the state if the round is due, or the best so far."""
        last = record["round"] == self.config.run.rounds or "ended" in record
        self.save(record["round"], vectors, record, last)

    def on_broken_off(self, server_round: int, vectors: Mapping[str, Tensor]) -> None:
        """Write the state after the last round that was done; before the first, what this run replaces comes back."""
        if server_round > 0 or (server_round == 0 and not replaces(self.config.run_dir)):
            self.save(server_round, vectors, {}, last=True)

    def save(self, server_round: int, vectors: Mapping[str, Tensor], record: Mapping[str, Any], last: bool) -> None:
        """Write the state if the round is due, or if it is the best so far by the method's score."""
        better = "score" in record and improves(record["score"], self._best)
        if better:
            self._best = record["score"]["value"]
        due = last or server_round % self.config.run.checkpoint_every == 0
        if not (better or due):
            return
        facts = {"round": server_round, "identity": self.config.identity(), "settings": self.config.flat()}
        facts |= {"best": self._best, "common-expert": self.common, "anchors": self.anchors, "start": self.start}
        facts["code"] = code_digest()
        if notes := self.notes():
            facts["method"] = notes
        data = safetensors.torch.save(dict(vectors), {"facts": json.dumps(facts)})
        if due:
            path = self.folder / checkpoint_name(server_round, data)
            self._write(path, data)
            self._whole.add(path)
            self._thin_out(server_round, path)
            forget_before(self.config.run_dir)
        if better:
            self._write(self.folder / "best.safetensors", data)

    def _thin_out(self, server_round: int, newest: Path) -> None:
        """Delete all but one whole checkpoint of each of the newest rounds; what is damaged counts for none."""
        rounds = {server_round}
        for at, path in checkpoint_files(self.folder):
            if path == newest:
                continue
            if at not in rounds and len(rounds) < self.config.run.keep_checkpoints and self._is_whole(path):
                rounds.add(at)
            else:
                path.unlink(missing_ok=True)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole and hashlib.sha256(path.read_bytes()).hexdigest() in path.name:
            self._whole.add(path)
        return path in self._whole

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose bytes are whole, or None.

        Raises:
            FedjetsError: it is of another configuration.
        """
        for server_round, path in checkpoint_files(self.folder):
            if not self._is_whole(path):
                log.warning("%s is damaged; using the one before it", path)
                continue
            data = path.read_bytes()
            facts = self._facts(data)
            self._same_run(facts)
            if server_round > self.config.run.rounds:
                raise FedjetsError(
                    f"run.rounds = {self.config.run.rounds}: the checkpoint in {self.folder} is of round"
                    f" {server_round}; raise it, or start afresh without run.resume"
                )
            self._best = facts["best"] if facts["best"] != -1.0 else None  # -1: nothing yet, in older files
            return Checkpoint(server_round, safetensors.torch.load(data), facts)
        return None

    @staticmethod
    def _facts(data: bytes) -> dict[str, Any]:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        facts: dict[str, Any] = json.loads(header["__metadata__"]["facts"])
        return facts

    def _same_run(self, facts: Mapping[str, Any]) -> None:
        if facts["common-expert"] != self.common:
            raise FedjetsError(
                f"run.resume: the checkpoint in {self.folder} was trained with another common expert; set"
                " common-expert.* back, or start afresh under another run.name"
            )
        if facts["identity"] == self.config.identity():
            if facts.get("code", code_digest()) != code_digest():
                log.warning("the checkpoint is of other code of this app: what follows may not be as it began")
            return
        mine, theirs = self.config.flat(), facts["settings"]
        decide = filter(self.config.decides, mine)
        differ = [f"{k} ({theirs.get(k)!r} -> {mine[k]!r})" for k in decide if theirs.get(k) != mine[k]]
        raise FedjetsError(
            f"run.resume: the checkpoint in {self.folder} is of another configuration: {', '.join(differ)};"
            " set them back, or start afresh under another run.name"
        )

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        try:
            with written(path, durable=True) as file:
                file.write_bytes(data)
        except OSError as error:
            raise FedjetsError(
                f"{path.parent}: no checkpoint could be written ({error.strerror}); the ones before it are good:"
                " make room and go on with --resume"
            ) from None
