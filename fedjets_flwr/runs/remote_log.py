"""Progress and results by way of the run's log, for a launcher that sees no file of the ServerApp.

Each announcement is a line of the ServerApp's output: a mark, a word that the ServerApp drew before it met any client,
and JSON. Other lines, such as a client's error message that imitates one, lack the word.
"""

import json
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedjets_flwr.files import written
from fedjets_flwr.runs.claim import forget_before

MARK = "fedjets-announce"
FILES = ("config.json", "prepared.json", "progress.json", "summary.json", "error.json")
_LINE = re.compile(rf"{MARK} ([0-9a-f]{{32}}) (\{{.*\}})\s*$")


class Announcer:
    """The ServerApp's side: says what it writes to its run folder."""

    def __init__(self) -> None:
        self.word = secrets.token_hex(16)
        self._count = 0

    def __call__(self, kind: str, value: object) -> None:
        """Say one thing: a file by its name, a ``record``, or ``cut``."""
        self._count += 1
        line = json.dumps({"n": self._count, "kind": kind, "value": value}, allow_nan=False)
        # One write, so that no other thread's line gets in between; no logger, whose level may hide it.
        sys.stdout.write(f"{MARK} {self.word} {line}\n")
        sys.stdout.flush()


class Mirror:
    """The launcher's side: reads a run's log as it grows and writes the run folder; a context manager."""

    def __init__(self, folder: Path, command: Sequence[str], environment: dict[str, str], cwd: Path) -> None:
        self.folder, self._command, self._cwd = folder, command, cwd
        self._environment = environment | {"PYTHONUNBUFFERED": "1"}
        self._word, self._read, self._same_folder = "", 0, False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._process is not None:
            self._process.terminate()
        self._thread.join(timeout=5)

    def read(self, text: str) -> None:
        """Take the announcements in a piece of the log; those that were taken before are passed over."""
        for line in text.splitlines():
            if found := _LINE.search(line):
                with self._lock:
                    self._take(found[1], found[2])

    def _take(self, word: str, line: str) -> None:
        if not self._word:
            self._word = word
            self._same_folder = _word_in(self.folder) == word
        if word != self._word:  # what follows it is a stranger's, and may not even be JSON
            return
        said: dict[str, Any] = json.loads(line)
        if said["n"] <= self._read:
            return
        self._read = said["n"]
        if self._same_folder:
            return
        kind, value = said["kind"], said["value"]
        if kind == "record":
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(value) + "\n")
        elif kind == "cut":
            (self.folder / "summary.json").unlink(missing_ok=True)
            with written(self.folder / "metrics.jsonl") as path:
                path.write_text("".join(json.dumps(record) + "\n" for record in value))
        elif kind in FILES:
            with written(self.folder / kind) as path:
                path.write_text(json.dumps(value, indent=2) + "\n")
        if kind == "summary.json":
            forget_before(self.folder)

    def _follow(self) -> None:
        """Read the stream; begin again where the connection broke, from the run's first line."""
        while not self._over.is_set():
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, errors="replace",
            )  # fmt: skip
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self.read(line)
            self._process.wait()
            self._over.wait(2)


def without_announcements(log: str) -> str:
    """Return a log for a reader; a line that has the mark but not the ServerApp's word stays."""
    lines = log.splitlines(keepends=True)
    said = next((f"{MARK} {found[1]} " for line in lines if (found := _LINE.search(line))), None)
    return "".join(line for line in lines if said is None or said not in line)


def _word_in(folder: Path) -> str:
    """Return the word of the ServerApp that writes to this very folder, if one does."""
    try:
        return str(json.loads((folder / "progress.json").read_text()).get("word", ""))
    except (OSError, ValueError, AttributeError):
        return ""
