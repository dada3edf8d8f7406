"""Programs that write one JSON line a round, measured side by side by letting one at a time go on.

A program is stopped (SIGSTOP) while another side is measured, so that all sides meet the same weather of a shared
machine without being started anew for every sample. It gets a short pulse now and then to send its heartbeat, which
Flower misses after a minute.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

POLL, PULSE, PULSE_EVERY = 0.003, 0.25, 20.0


class Stuck(RuntimeError):
    """A program ended, or wrote nothing for too long."""


class Paced:
    """A program whose rounds can be counted, paused and resumed.

    Attributes:
        records: all lines so far.
        times: when each of them came (monotonic seconds).
    """

    def __init__(self, lines: Path, pids: Callable[[], Iterable[int]], alive: Callable[[], bool]) -> None:
        self.records: list[dict[str, Any]] = []
        self.times: list[float] = []
        self._lines, self._pids, self._alive = lines, pids, alive
        self._read = 0
        self._going_on = threading.Event()
        self._pulses: threading.Thread | None = None

    def rounds(self, count: int, seconds: float = 300.0) -> list[float]:
        """Let it go on for ``count`` more whole rounds; return the seconds of each.

        The round that a pause interrupted is not among them: its timers ran out meanwhile. The first of all rounds
        begins when this is first called.

        Raises:
            Stuck: they did not come.
        """
        self._poll()  # what the pulses brought
        interrupted = 1 if self.records else 0
        marks = [time.monotonic()]
        start = len(self.records)
        self.resume()
        deadline, checked = time.monotonic() + seconds, 0.0
        while len(self.records) < start + interrupted + count:
            self._poll()
            if time.monotonic() > checked + 1:
                checked = time.monotonic()
                self._pids()
                if checked > deadline or not self._alive():
                    got = len(self.records) - start
                    raise Stuck(f"{self._lines}: {got} of {count + interrupted} lines after {seconds:.0f} s")
            time.sleep(POLL)
        self.pause()
        marks = (marks + self.times[start:])[interrupted : interrupted + count + 1]
        return [b - a for a, b in pairwise(marks)]

    def pause(self) -> None:
        """Stop it where it is."""
        _signal(self._pids(), signal.SIGSTOP)
        self._going_on.clear()
        self._pulses = threading.Thread(target=self._pulse, daemon=True)
        self._pulses.start()

    def resume(self) -> None:
        """Let it go on."""
        self._going_on.set()
        if self._pulses is not None:
            self._pulses.join()
        _signal(self._pids(), signal.SIGCONT)

    def _pulse(self) -> None:
        while not self._going_on.wait(PULSE_EVERY):
            _signal(self._pids(), signal.SIGCONT)
            time.sleep(PULSE)
            _signal(self._pids(), signal.SIGSTOP)

    def _poll(self) -> None:
        try:
            with self._lines.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self.records.append(json.loads(line))
            self.times.append(time.monotonic())


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def descendants(root: int) -> dict[int, str]:
    """Return the command lines of all processes below ``root``, by process id (Linux)."""
    children: dict[int, list[int]] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (OSError, UnicodeDecodeError):
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, queue = {}, list(children.get(root, []))
    while queue:
        pid = queue.pop()
        found[pid] = commands.get(pid, "")
        queue += children.get(pid, [])
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs (one that waits to be reaped does not)."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def memory(pid: int, field: str = "VmRSS") -> float:
    """Return resident MB of a process now, or at its peak (``VmHWM``)."""
    for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0
