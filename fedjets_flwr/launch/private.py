"""A daemon of Flower's that answers its own user alone: ``python -m fedjets_flwr.launch.private COMMAND ARGUMENTS...``.

Flower 1.41 asks nobody who he is, on any API of its one port. Who connects as another user is hung up on before a byte
of his is read.
"""

import asyncio
import sys
from importlib.metadata import entry_points

from uvicorn import config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedjets_flwr.launch import peers

NAME = "fedjets_flwr.launch.private"


class OwnUserProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP for connections from this machine by this process's user; others get nothing."""

    _welcome = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._welcome = peers.is_own(transport.get_extra_info("peername"), transport.get_extra_info("sockname"))
        if not self._welcome:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._welcome:
            super().data_received(data)


def main() -> None:
    """Run the daemon that the command line names."""
    del sys.argv[0]
    config.HTTP_PROTOCOLS["auto"] = f"{NAME}:{OwnUserProtocol.__name__}"
    (command,) = entry_points(group="console_scripts", name=sys.argv[0])
    command.load()()


if __name__ == "__main__":
    main()
