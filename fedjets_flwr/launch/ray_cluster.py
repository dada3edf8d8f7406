"""A Ray cluster that runs already: what it has to offer to a simulation, and which node hosts which SuperNodes."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import OWN_DATA, Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.stand_in import stand_in
from fedjets_flwr.printable import one_line

ADDRESS = re.compile(r"\[?(?P<host>[^/\s]+?)\]?:(?P<port>\d{1,5})")
CONNECT_SECONDS = 5.0
SURVEY_SECONDS = 180.0
ATTEMPTS = {"RAY_NUM_REDIS_GET_RETRIES": "3"}
"""Ray asks a cluster twenty times, a second apart, whether a wrong token is right by now."""
NO_UV = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"""Under ``uv run`` Ray would send the working folder to the nodes and run all there from it."""
PLACED = Path(__file__).with_name("ray_actors.py")
"""Not imported: Ray and Flower take seconds."""
REFUSED = "InvalidAuthToken"
"""Of a cluster that asks for another token than ours."""


@dataclass(frozen=True)
class RayNode:
    """A node of a Ray cluster.

    Attributes:
        name: Ray's id.
        host: where it is.
        cpus: that are free.
        gpus: that are free.
    """

    name: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class RayCluster:
    """A cluster that runs.

    Attributes:
        address: of its head, HOST:PORT.
        nodes: that are alive, the one of this machine first.
    """

    address: str
    nodes: tuple[RayNode, ...]


@dataclass(frozen=True)
class Placement:
    """Where clients' processes go: the node of each, by Ray's id; process i serves SuperNode i.

    Flower 1.41 hands a message to any process that is idle, on whichever node, and vectors in shared memory must reach
    one that sees it.

    Attributes:
        address: of the cluster's head, HOST:PORT.
        nodes: one for each process.
    """

    address: str
    nodes: tuple[str, ...]

    def of(self, number: int) -> "Placement":
        """Return the same: a cluster serves one simulation at a time."""
        return self

    def told(self, config: Config) -> dict[str, Scalar]:
        """Return the settings as clients' processes are told them: a node's environment is not this one's."""
        flat = config.flat()
        if not config.run.cache_dir and "FEDJETS_CACHE" in os.environ:
            flat["run.cache-dir"] = str(config.cache_dir.absolute())
        if not config.data.dir and "FEDJETS_DATA" in os.environ and config.data.name not in OWN_DATA:
            flat["data.dir"] = str(config.data_dir.absolute())
        return flat

    def environment(self, folder: Path, path: str) -> dict[str, str]:
        """Return what makes Flower simulate there.

        Args:
            folder: takes the command that stands in for Flower's.
            path: on which all other commands are found.

        Raises:
            FedjetsError: no command runs from the folder; Flower's own would be taken instead.
        """
        (folder / "nodes.json").write_text(json.dumps(self.nodes))
        if (found := stand_in(["-P", str(PLACED), str(folder / "nodes.json")], folder, path)) == path:
            raise FedjetsError(f"--ray-address: {folder} is on a file system without programs (noexec); set TMPDIR")
        return {"RAY_ADDRESS": self.address, "PATH": found} | NO_UV

    def ahead(self, folder: Path, path: str) -> list[str]:
        """Return no command that starts beside the SuperLink: Ray runs."""
        return []


def interleaved(nodes: Sequence[str], counts: Sequence[int]) -> tuple[str, ...]:
    """Return each node as often as its count says, in turns, so that the first few are on as many nodes as can be."""
    turns = zip_longest(*([node] * count for node, count in zip(nodes, counts, strict=True)))
    return tuple(node for turn in turns for node in turn if node is not None)


def find_cluster(address: str) -> RayCluster:
    """Return the cluster at ``HOST:PORT``, or, for ``auto``, the one that Ray finds on this machine.

    Raises:
        FedjetsError: there is none that this machine may use, or a node lacks this release; one line with the mend.
    """
    option = f"--ray-address {address}"
    check_address(address)
    found = _survey(address)
    if error := found.get("error"):
        raise FedjetsError(f"{option}: {_why(str(error))}")
    if not found["nodes"]:
        raise FedjetsError(f"{option}: no node of the cluster is alive; start some with `ray start`")
    for node in found["nodes"]:
        for name, here in found["here"].items():
            if (there := node["installed"].get(name, "none")) != here:
                raise FedjetsError(
                    f"{option}: node {node['host']} has {name} {one_line(there)}, and {here} is here; install the same"
                    " on all nodes, and start `ray` from that environment"
                )
    nodes = tuple(RayNode(node["name"], node["host"], node["cpus"], node["gpus"]) for node in found["nodes"])
    return RayCluster(found["address"], nodes)


def check_address(address: str) -> None:
    """Raise FedjetsError if nothing can be, or nothing is, at an address."""
    option = f"--ray-address {address}"
    if address == "auto":
        return
    match = ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise FedjetsError(
            f"{option}: give HOST:PORT, as `ray start --head` printed it, or auto; `fedjets` must run on a node of the"
            " cluster"
        )
    try:
        socket.create_connection((match["host"], int(match["port"])), CONNECT_SECONDS).close()
    except OSError as error:
        raise FedjetsError(
            f"{option}: nothing answers there ({error.strerror or error}); start a cluster with `ray start --head`, or"
            " give the address that it printed"
        ) from None


def _survey(address: str) -> dict[str, Any]:
    """Return what the process that asked says: of Ray's own words, if it did not come to say anything."""
    command = [sys.executable, "-P", "-m", "fedjets_flwr.launch.ray_survey", address]
    try:
        done = subprocess.run(
            command, env=os.environ | ATTEMPTS | NO_UV, capture_output=True, text=True, timeout=SURVEY_SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {SURVEY_SECONDS:g} s"}
    if REFUSED in done.stderr:  # Ray logs this, and raises that it could not connect
        return {"error": REFUSED}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines() or ["no word"]
        return {"error": last[-1]}
    return found


def _why(error: str) -> str:
    """Return why Ray would not have us, with the mend."""
    if REFUSED in error or error.startswith("AuthenticationError"):
        return (
            "the cluster refuses the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what"
            " the cluster was started with"
        )
    if "No node info found" in error:
        return "this machine is no node of the cluster; `ray start --address=HOST:PORT` makes it one, or run on one"
    if "Could not find any running Ray" in error:
        return "no Ray runs on this machine; start it with `ray start`, or give HOST:PORT"
    words = one_line(" ".join(error.split()))
    if "Version mismatch" in error:
        return f"{words}; run `fedjets` with the cluster's Ray and Python"
    return f"Ray does not let us in: {words}"
