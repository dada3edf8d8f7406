"""Daemons as children that end with their parent."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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


def start_daemon(
    command: Sequence[str], environment: dict[str, str], folder: Path, log: Path
) -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own whose output is appended to a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True, preexec_fn=_die_with_parent,
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


def stop_daemons(processes: Sequence["subprocess.Popen[bytes]"], seconds: float = 15) -> None:
    """End daemons, by force where they do not end in time."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill_daemon(process)


def kill_daemon(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a daemon and its session; returns when it is gone, so that its own children notice."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _die_with_parent() -> None:
    """Have the kernel end this child when its parent dies, so that a killed launcher leaves no daemon (Linux)."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
