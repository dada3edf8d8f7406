"""What a Ray cluster offers, as JSON: ``python -P -m fedjets_flwr.launch.ray_survey ADDRESS``.

It is a process of its own because Ray ends, or keeps waiting, the process that fails to connect.
"""

import json
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedjets_flwr.release import DISTRIBUTION, code_digest

ANSWER_SECONDS = 120.0
"""Within which every node must say what is installed there."""


def installed() -> dict[str, str]:
    """Return what decides the bits of a run here, and its version; of this app also what its files hold.

    What follows a plus sign is the build of a version, such as one for a GPU, of which a cluster may have several.
    """
    found = {name: _version(name).partition("+")[0] for name in ("flwr", "torch", "torchvision", "numpy")}
    return {DISTRIBUTION: f"{_version(DISTRIBUTION)} ({code_digest()})"} | found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def installed_there() -> dict[str, str]:
    """Return the same of the node where this runs; nothing, where there is no such release."""
    try:
        from fedjets_flwr.launch.ray_survey import installed
    except ImportError:
        return {}
    return installed()


def survey(address: str) -> dict[str, Any]:
    """Return the cluster's address and nodes: the server's machine first, then as Ray names them."""
    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    own = ray.get_runtime_context()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    order = sorted(nodes, key=lambda name: (name != own.get_node_id(), name))
    ask = ray.remote(num_cpus=0, max_retries=0)(installed_there)
    placed = [NodeAffinitySchedulingStrategy(name, soft=False) for name in order]
    answers = ray.get([ask.options(scheduling_strategy=there).remote() for there in placed], timeout=ANSWER_SECONDS)
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    return {
        "address": own.gcs_address,
        "here": installed(),
        "nodes": [
            {
                "name": name, "host": nodes[name]["NodeManagerAddress"], "installed": answer,
                "cpus": free.get(name, {}).get("CPU", 0.0), "gpus": free.get(name, {}).get("GPU", 0.0),
            }
            for name, answer in zip(order, answers, strict=True)
        ],
    }  # fmt: skip


def main() -> None:
    """Print the survey of the cluster that the command line names, or why there is none."""
    try:
        found = survey(sys.argv[1])
    except Exception as error:
        reason = error.__cause__ or error  # Ray says only that it could not connect, of whatever kept it from it
        found = {"error": f"{type(reason).__name__}: {reason}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
