"""Flower's simulation on this machine, which imports what it needs and starts its Ray before Flower asks for it.

``python -P ready_simulation.py SOCKET FILE``, FILE holding arguments of ``ray.init``; :mod:`.ask_simulation` passes on
the arguments of ``flwr-simulation`` by the socket, and ends when this process does. Flower 1.41 would start Ray when it
has imported the app, and with a runtime environment of its own, for which no process will do that Ray has ready.

Nothing of this app is imported: Flower does so, from the app that it was handed.
"""

import json
import socket
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Get ready, wait for Flower to ask, and run ``flwr-simulation``."""
    address, file = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(1)
        import ray

        try:
            ray.init(**json.loads(Path(file).read_text()))
        except Exception:  # Flower tries again, and tells whoever waits for the run
            traceback.print_exc()
        import torch  # noqa: F401
        from flwr.simulation.app import flwr_simulation

        asking, _ = server.accept()
        with asking.makefile() as lines:
            sys.argv = ["flwr-simulation", *json.loads(lines.readline())]
    flwr_simulation()


if __name__ == "__main__":
    main()
