"""Who is at the other end of a connection on this machine; the kernel knows, and nobody has to keep a secret.

Linux names the user of every IPv4 socket in ``/proc/net/tcp``; the other end of a connection over loopback is one.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # no SuperLink waits for that
    from rich.console import Console

TABLE = Path("/proc/net/tcp")
ESTABLISHED = "01"
NO_INODE = "0"
"""Of a socket that its process has closed; the kernel may call root its user."""
LOOKS = 3
"""A table that changes while it is read may lack a line."""

Address = tuple[str, int]


def is_own(peer: Address, here: Address) -> bool:
    """Return whether an open socket of this process's user is the other end of a connection.

    Args:
        peer: address of the other end.
        here: address of this end.
    """
    return any(owner(TABLE.read_text(), peer, here) == os.geteuid() for _ in range(LOOKS))


def owner(table: str, local: Address, remote: Address) -> int | None:
    """Return the user of an open, connected socket by the kernel's table; None: there is no such socket."""
    wanted = [_as_listed(local), _as_listed(remote), ESTABLISHED]
    for line in table.splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == wanted and fields[9] != NO_INODE:
            return int(fields[7])
    return None


def can_tell() -> bool:
    """Return whether this machine tells who connects: it is asked about a connection of our own."""
    try:
        with _connection() as (client, server):
            return is_own(client.getsockname(), server.getsockname())
    except OSError:
        return False


@contextmanager
def _connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            yield client, server


def _as_listed(address: Address) -> str:
    """Return an address as the table has it, the four bytes of the host as a number of this machine."""
    host, port = address
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


def tell_who_reaches(console: "Console") -> None:
    """Say so where daemons on this machine cannot keep its other users out."""
    if not can_tell():
        console.print("other users of this machine can reach the run: only Linux tells who connects; be its one user")
