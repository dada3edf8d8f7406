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
from pathlib import Path
from typing import Any

POLL, PULSE, PULSE_EVERY = 0.003, 0.05, 12.0


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
        self._read, self._paused_at, self._pulsed = 0, 0.0, 0.0
        self._going_on = threading.Event()
        self._pulses: threading.Thread | None = None

    def rounds(self, count: int, seconds: float = 300.0) -> list[float]:
        """Let it go on for ``count`` more lines; return the seconds that each took, pauses left out.

        Raises:
            Stuck: they did not come.
        """
        start = len(self.records)
        marks = [self.resume()]
        checked = 0.0
        deadline = time.monotonic() + seconds
        while len(self.records) < start + count:
            self._poll()
            if len(self.records) >= start + count:
                break
            if time.monotonic() > checked + 1:
                checked = time.monotonic()
                self._pids()
                if checked < deadline and self._alive():
                    continue
                raise Stuck(f"{self._lines}: {len(self.records) - start} of {count} lines after {seconds:.0f} s")
            time.sleep(POLL)
        self.pause()
        marks += self.times[start : start + count]
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    def pause(self) -> None:
        """Stop it where it is."""
        _signal(self._pids(), signal.SIGSTOP)
        self._paused_at, self._pulsed = time.monotonic(), 0.0
        self._going_on.clear()
        self._pulses = threading.Thread(target=self._pulse, daemon=True)
        self._pulses.start()

    def resume(self) -> float:
        """Let it go on; return when the round that it is in would have begun without the pause."""
        self._going_on.set()
        if self._pulses is not None:
            self._pulses.join()
        now = time.monotonic()
        begun = now - (self._paused_at - self.times[-1]) - self._pulsed if self._paused_at and self.times else now
        _signal(self._pids(), signal.SIGCONT)
        return begun

    def _pulse(self) -> None:
        while not self._going_on.wait(PULSE_EVERY):
            begun = time.monotonic()
            _signal(self._pids(), signal.SIGCONT)
            time.sleep(PULSE)
            _signal(self._pids(), signal.SIGSTOP)
            self._pulsed += time.monotonic() - begun

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
