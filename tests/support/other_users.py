"""Another user of this machine, and what listens on it, for tests of what he reaches (Linux, as root)."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

NOBODY = 65534
LISTENING = "0A"

BECOME = """\
import encodings.idna, os, sys

def become():
    user = int(sys.argv.pop(1))
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)

"""
LIST = """\
from pathlib import Path
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.supercore.control import ControlHttpClient

authority = Path(sys.argv[3]).read_bytes() if sys.argv[3:] else None
client = ControlHttpClient.from_server_address(sys.argv[2], authority is None, authority, [])
become()
print(len(client.ListRuns(ListRunsRequest()).run_dict))
"""
"""Prints how many runs the SuperLink at an address has; a second argument names the authority of one with TLS."""
ASK = """\
import socket

become()
host, port = sys.argv[1].rsplit(":", 1)
with socket.create_connection((host, int(port)), timeout=20) as connection:
    try:
        connection.sendall(f"{sys.argv[2]} HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
        print("bytes", len(connection.recv(1)))
    except ConnectionError:
        print("bytes 0")
"""
"""Prints how much of an answer an address gives to a request without TLS: ``bytes 1`` or ``bytes 0``."""

needs_another_user = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root acts as another user"
)


@dataclass(frozen=True)
class Listener:
    """A TCP port.

    Attributes:
        command: of the process that listens, its words divided by blanks.
    """

    host: IPv4Address | IPv6Address
    port: int
    command: str

    @property
    def address(self) -> str:
        """Its address, for a client on this machine."""
        return f"127.0.0.1:{self.port}"


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Return all ports on which processes listen."""
    known, found = _listening_sockets(), []
    for pid in pids:
        command = _read(f"/proc/{pid}/cmdline").replace("\0", " ")
        found += [Listener(*known[inode], command) for inode in _sockets(pid) if inode in known]
    return found


def run_as(user: int, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code as a user, who knows nothing of this process's environment.

    It calls ``become()`` after its imports, since the user may not read this Python's files. From then on its arguments
    begin at ``sys.argv[1]``, before that at ``sys.argv[2]``.
    """
    return subprocess.run(
        [sys.executable, "-c", BECOME + code, str(user), *arguments], cwd="/", check=False, capture_output=True,
        text=True, timeout=120, env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def check_hung_up(attempt: "subprocess.CompletedProcess[str]") -> None:
    """The attempt failed, for the reason that nobody spoke to it."""
    assert attempt.returncode != 0
    assert attempt.stdout == ""
    assert re.search(r"^httpx\.(ReadError|RemoteProtocolError)", attempt.stderr, re.MULTILINE), attempt.stderr


def _listening_sockets() -> dict[str, tuple[IPv4Address | IPv6Address, int]]:
    """Return inode -> address and port."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in _read(f"/proc/net/{table}").splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                host, _, port = fields[1].partition(":")
                found[fields[9]] = (_host(host), int(port, 16))
    return found


def _host(listed: str) -> IPv4Address | IPv6Address:
    """Return an address that the kernel lists as numbers of this machine, four bytes each."""
    words = [int(listed[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(listed), 8)]
    host = ip_address(b"".join(words))
    return getattr(host, "ipv4_mapped", None) or host


def _sockets(pid: int) -> list[str]:
    """Return the inodes of a process's sockets; none of a process that ended meanwhile."""
    found = []
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            kind, _, inode = str(descriptor.readlink()).partition(":")
            found += [inode[1:-1]] if kind == "socket" else []
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
