"""A Ray cluster of two nodes on this machine, one of them in a mount namespace of its own (Linux, as root).

That one sees neither the shared memory nor the temporary files of the other, as another machine would not.
"""

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedjets_flwr.launch.daemons import free_ports, start_daemon, stop_daemons
from fedjets_flwr.release import APP_ROOT
from tests.support.processes import descendants

HEAD, WORKER = "127.0.0.2", "127.0.0.3"
"""Ray takes 127.0.0.1 for the address by which others reach this machine."""


def _can_hide() -> bool:
    hidden = Path(tempfile.gettempdir()).resolve()
    if any(path.resolve().is_relative_to(hidden) for path in (APP_ROOT, Path(sys.prefix))):
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_namespaces = pytest.mark.skipif(not _can_hide(), reason="needs mount namespaces, and no checkout below /tmp")


@dataclass(frozen=True)
class TwoNodes:
    """A cluster that runs; a CPU each.

    Attributes:
        address: of its head.
        token: that it asks for.
        head: process above all of the node on this machine.
        worker: of the other node.
    """

    address: str
    token: str
    head: "subprocess.Popen[bytes]"
    worker: "subprocess.Popen[bytes]"

    def alive(self) -> bool:
        """Return whether both nodes run."""
        return self.head.poll() is None and self.worker.poll() is None

    def actors(self) -> list[int]:
        """Return the ids of all clients' processes."""
        everyone = descendants(self.head.pid) | descendants(self.worker.pid)
        return [pid for pid in everyone if "ClientAppActor" in _title(pid)]


@contextmanager
def two_nodes(log: Path) -> Iterator[TwoNodes]:
    """Start a cluster; nothing of it is left after the ``with`` block."""
    hidden, token = tempfile.gettempdir(), secrets.token_hex(32)
    scratch = Path(tempfile.mkdtemp(prefix="ray-", dir=hidden))
    address = f"{HEAD}:{free_ports(1)[0]}"
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(APP_ROOT),
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    ray.append("--object-store-memory=80000000")
    port, host = address.rpartition(":")[2], f"--node-ip-address={HEAD}"
    head = [*ray, "--head", f"--port={port}", host, f"--temp-dir={scratch}", "--include-dashboard=false"]
    worker = shlex.join([*ray, f"--address={address}", f"--node-ip-address={WORKER}"])
    alone = f"mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs {shlex.quote(hidden)} && exec {worker}"
    started = []
    try:
        for command in (head, ["unshare", "--mount", "sh", "-c", alone]):
            started.append(start_daemon(command, environment, APP_ROOT, log, scratch))
            _wait_for("Ray runtime started", len(started), log)
        yield TwoNodes(address, token, *started)
    finally:
        stop_daemons(started, seconds=60)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for(words: str, times: int, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while log.read_text(errors="replace").count(words) < times:
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.2)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
