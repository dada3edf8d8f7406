"""Flower's simulation on this machine, which imports what it needs and starts its Ray before Flower asks for it.

``python -P ready_simulation.py SOCKET FILE``, FILE holding arguments of ``ray.init``; ``ask_simulation.py`` passes on
the arguments of ``flwr-simulation`` by the socket, and ends when this process does. Flower 1.41 would start Ray when it
has imported the app, and with a runtime environment of its own, for which no process will do that Ray has ready.

Nothing of this app is imported: Flower does so, from the app that it was handed.
"""

import json
import socket
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from queue import Queue
from typing import Any

LOOK = 0.1
"""Seconds after which Flower looks for messages whatever it was told."""


def hand_out(state: Any, queue: "Queue[Any]", nodes: Iterable[int], stopped: threading.Event) -> None:
    """Put messages into the queue of the clients' processes as they come, until it is all stopped.

    Flower 1.41 looks for them every 0.1 s, which is longer than a round of small experts takes.

    Args:
        state: Flower's, of this process, that takes the server's messages.
        queue: gets them.
        nodes: for whom they may be.
        stopped: ends it.
    """
    came, store = threading.Event(), state.store_message_ins

    def store_and_tell(message: Any) -> Any:
        try:
            return store(message)
        finally:
            came.set()

    state.store_message_ins = store_and_tell
    while not stopped.is_set():
        came.wait(LOOK)
        came.clear()
        for node in nodes:
            for message in state.get_message_ins(node_id=node, limit=1):
                queue.put(message)
                came.set()  # there may be another


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
        from flwr.server.superlink.fleet.vce import vce_api
        from flwr.simulation.app import flwr_simulation

        vars(vce_api)["add_messages_to_queue"] = hand_out
        asking, _ = server.accept()
        with asking.makefile() as lines:
            sys.argv = ["flwr-simulation", *json.loads(lines.readline())]
    flwr_simulation()


if __name__ == "__main__":
    main()
