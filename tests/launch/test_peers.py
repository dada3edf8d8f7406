"""The kernel tells whose connection it is; the cases that it cannot tell are no connection of ours."""

import io
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from fedjets_flwr.launch import peers
from fedjets_flwr.launch.peers import tell_who_reaches
from tests.support.other_users import NOBODY, needs_another_user

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who connects")
TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 11 1 0 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 12 1 0 20 4 30 10 -1
   2: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000  1000        0 13 1 0 20 4 30 10 -1
   3: 0100007F:9C41 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   4: 0100007F:9C42 0100007F:1F90 04 00000000:00000000 00:00000000 00000000  1000        0 15 1 0 20 4 30 10 -1
"""
SERVER = ("127.0.0.1", 8080)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection of our own: its client's end and its server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


@pytest.mark.skipif(sys.byteorder != "little", reason="the table is of a machine that is")
@pytest.mark.parametrize(
    ("port", "user"),
    [
        pytest.param(40000, 1001, id="the client's user, not the server's"),
        pytest.param(40001, None, id="a closed socket is nobody's, though root is named"),
        pytest.param(40002, None, id="a connection that ends is nobody's"),
        pytest.param(40003, None, id="no such connection"),
    ],
)
def test_the_user_at_the_other_end_is_read_from_the_table(port: int, user: int | None) -> None:
    assert peers.owner(TABLE, ("127.0.0.1", port), SERVER) == user


@linux
def test_a_connection_of_our_own_is_known_at_both_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    client, server = pair
    assert peers.is_own(client.getsockname(), server.getsockname())
    assert peers.is_own(server.getsockname(), client.getsockname())
    assert peers.can_tell()


@linux
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_one_that_hung_up_is_not_known(pair: tuple[socket.socket, socket.socket], reset: bool) -> None:
    client, server = pair
    peer = client.getsockname()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", int(reset), 0))
    client.close()
    assert not peers.is_own(peer, server.getsockname())


@needs_another_user
def test_a_connection_of_another_user_is_not_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pid = os.fork()
        if not pid:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with socket.create_connection(listener.getsockname()) as client:
                client.recv(1)
            os._exit(0)
        server, peer = listener.accept()
        with server:
            assert peers.owner(peers.TABLE.read_text(), peer, server.getsockname()) == NOBODY
            assert not peers.is_own(peer, server.getsockname())
        os.waitpid(pid, 0)


def test_a_machine_without_the_table_does_not_tell_and_a_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO())
    monkeypatch.setattr(peers, "TABLE", tmp_path / "none")
    assert not peers.can_tell()
    tell_who_reaches(console)
    assert "other users of this machine can reach the run" in console.file.getvalue()  # type: ignore[attr-defined]


@linux
def test_where_the_machine_tells_there_is_nothing_to_say() -> None:
    console = Console(file=io.StringIO())
    tell_who_reaches(console)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
