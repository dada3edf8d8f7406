"""Stands in for ``flwr-simulation`` where one is ready: ``python -I -S ask_simulation.py SOCKET ARGUMENTS...``.

Nothing but the standard library is imported, so it is there in 20 ms.
"""

import json
import socket
import sys

if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as ready:
        ready.connect(sys.argv[1])
        ready.sendall(json.dumps(sys.argv[2:]).encode() + b"\n")
        ready.recv(1)  # nothing comes but the end
