"""A small process above a daemon, by which the daemon, and all that it ever started, end with their launcher.

``python -I -S guard.py LAUNCHER SCRATCH COMMAND...``, LAUNCHER being a process id and SCRATCH a folder or nothing.
Flower's processes do not see to that: a simulation whose SuperLink is gone raises SIGINT in a thread of its own, which
does not wake its main thread, and trains on with all cores. SuperExec has a session of its own, so no signal to a group
or session reaches them all.

On Linux the guard is the *subreaper* of all below it: the kernel makes it the parent of every process there that loses
its own, so nothing leaves the tree. Elsewhere it reaches the daemon's process group, and not what left that.

When the launcher is gone, when the daemon ended, or at SIGTERM, SIGINT or SIGHUP, all below get SIGTERM and, after a
grace, SIGKILL, again and again until nothing is left; at SIGUSR1 there is no grace. Of a launcher that is gone the
scratch folder goes too: it holds keys. SIGQUIT kills the daemon alone, as a crash would. The exit status
is the daemon's. Nothing but the standard library is imported, so it is up in 30 ms.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE = 3.0
"""Seconds from SIGTERM to SIGKILL."""
LOOK = 0.5
"""Seconds between two looks whether the launcher lives."""
AT_ONCE = signal.SIGUSR1
END = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AT_ONCE}
CRASH = signal.SIGQUIT
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PROC = Path("/proc")


class Guard:
    """Starts a daemon.

    Attributes:
        status: its exit code, minus the signal that killed it; None while it runs.
    """

    def __init__(self, launcher: int, command: list[str]) -> None:
        self.status: int | None = None
        self._grace = GRACE
        self._launcher, self._signals = launcher, queue_signals({*END, CRASH, signal.SIGCHLD})
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._daemon = start(command)

    def watch(self) -> None:
        """Return when the daemon ended, the launcher is gone, or a signal asks for the end."""
        received: set[int] = set()
        while self.status is None and os.getppid() == self._launcher and not received & END:
            received = self._wait(LOOK)
            self._reap()
            if CRASH in received and self.status is None:
                os.kill(self._daemon, signal.SIGKILL)
        if AT_ONCE in received:
            self._grace = 0.0

    def end(self) -> None:
        """Return when nothing is left below."""
        if self._grace:
            self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + self._grace
        while self._reap():
            if time.monotonic() > deadline:
                self._signal_all(signal.SIGKILL)
            self._wait(0.05)
        self._signal_all(signal.SIGKILL)  # without a subreaper, orphans in the daemon's group are nobody's children

    def _wait(self, seconds: float) -> set[int]:
        """Return the signals that came, as soon as there is one, or none when the time is over."""
        select.select([self._signals], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            return set(os.read(self._signals, 4096))
        return set()

    def _reap(self) -> bool:
        """Bury children that ended, adopted ones too; return whether there are others."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return True
                if pid == self._daemon:
                    self.status = os.waitstatus_to_exitcode(status)
        return False

    def _signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all below; several times, since a process may start another meanwhile."""
        for pid in below(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        if not PROC.is_dir():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._daemon, number)


def queue_signals(numbers: set[signal.Signals]) -> int:
    """Return a file descriptor from which the numbers of signals are read, a byte each, as they come."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, lambda *_: None)  # exec sets it back to the default for the daemon
    return reader


def start(command: list[str]) -> int:
    """Start a command in a process group of its own, which not even a killed guard leaves behind; return its id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, END)  # the child's would go to the handlers that it has of its parent
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
        return pid
    try:
        for number in END:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, END)
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(127)


def prctl(option: int, value: int) -> None:
    """Set a property of this process, where the system has it (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def below(root: int) -> list[int]:
    """Return the ids of all processes that descend from one; none without ``/proc``."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir() if PROC.is_dir() else ():
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile, or is no process
            pid, facts = int(folder.name), (folder / "stat").read_text(errors="replace")
            children.setdefault(int(facts.rpartition(")")[2].split()[1]), []).append(pid)
    found = children.get(root, [])
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def main() -> int:
    """Guard the daemon that the command line names; return its exit status as a shell tells it."""
    launcher, scratch = int(sys.argv[1]), sys.argv[2]
    guard = Guard(launcher, sys.argv[3:])
    guard.watch()
    guard.end()
    if scratch and os.getppid() != launcher:
        import shutil  # a tenth of the guard's own start

        shutil.rmtree(scratch, ignore_errors=True)
    status = guard.status or 0
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
