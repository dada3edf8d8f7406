"""Daemons that end with their launcher, and with them all that they started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedjets_flwr.launch import guard, peers

SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Memory of experts comes in huge pages where Linux has them: it is there in a fraction of the time."""
POLL = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}
"""Seconds between two looks of Flower for work, a run or a message; its own default is 1."""
FOLDERS = ("FEDJETS_DATA", "FEDJETS_CACHE")


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """Return the environment of Flower's commands.

    Args:
        home: a private FLWR_HOME, for daemons on this machine; None: the user's own, to reach another machine.
    """
    scripts = str(Path(sys.executable).parent)
    found = {**os.environ, **SWITCHES, **HUGE_PAGES, "PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    if home is not None:
        found |= POLL | {"FLWR_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    # A daemon's folder is not the caller's.
    return found | {k: str(Path(found[k]).expanduser().absolute()) for k in FOLDERS if found.get(k)}


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody listens on right now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def for_own_user(command: Sequence[str]) -> list[str]:
    """Return the command of a Flower daemon that hangs up on other users, where the machine tells who connects."""
    return [sys.executable, "-P", "-m", "fedjets_flwr.launch.private", *command] if peers.can_tell() else list(command)


def start_daemon(
    command: Sequence[str], environment: dict[str, str], folder: Path, log: Path, scratch: Path | None = None
) -> "subprocess.Popen[bytes]":
    """Start a process and return the guard above it, which ends as it ends.

    Args:
        command: its command line.
        environment: all of its environment.
        folder: where it works.
        log: to which its output is appended.
        scratch: a folder that goes if this process is killed and cannot delete it.
    """
    guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(scratch or ""), *command]
    with log.open("ab") as file:
        return subprocess.Popen(
            guarded, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True,
        )  # fmt: skip


def wait_for_port(process: "subprocess.Popen[bytes]", port: int, seconds: float = 120) -> bool:
    """Return whether a daemon listens before it ends or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False  # most likely another process took the port
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False


def stop_daemons(processes: Sequence["subprocess.Popen[bytes]"], at_once: bool = False, seconds: float = 15) -> None:
    """End daemons and all that they started; a guard that needs longer, for want of power over a process, stays.

    Args:
        processes: their guards.
        at_once: they have nothing to put in order.
        seconds: to wait for them.
    """
    for process in processes:
        process.send_signal(guard.AT_ONCE if at_once else signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))


def kill_daemon(process: "subprocess.Popen[bytes]") -> None:
    """Have a daemon end as in a crash; returns when what it started is gone, too."""
    while process.poll() is None:
        process.send_signal(guard.CRASH)
        with contextlib.suppress(subprocess.TimeoutExpired):  # below a shell's `&`, a guard that just starts ignores it
            process.wait(timeout=1)
