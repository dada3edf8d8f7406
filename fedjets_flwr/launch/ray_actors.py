"""Flower's simulation, with the client process of each SuperNode on a Ray node of its own choice, for good.

``python -P ray_actors.py FILE ARGUMENTS...``, FILE naming the node of each process and the arguments being those of
``flwr-simulation``. Flower 1.41 makes as many processes as would fit an empty cluster, lets Ray place them, hands a
message to any that is idle, and serves no more at a time than this machine has cores, plus four.

Nothing of this app is imported: Flower does so, from the app that it was handed.
"""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.app import flwr_simulation
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PLACE_SECONDS = 100.0
"""Within which all actors must run: the room for one may have been taken since it was found. The server waits for them
from about the same moment, by default for ``limits.node-seconds`` = 120, and does not know why they are not there."""

Job = tuple[Callable[[], ClientApp], Message, str, Context]


class PlacedActors:
    """Stands in for Flower's pool of actors: SuperNode i is always served by actor i, on the i-th node.

    With more SuperNodes than actors, some share one.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        actor_type: Any,
        client_resources: dict[str, int | float],
        actor_kwargs: dict[str, Any],
    ) -> None:
        self._nodes = nodes
        self._new = lambda node: actor_type.options(
            **client_resources, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(**actor_kwargs)
        self._actors: list[Any] = []
        self.actors_capacity = len(nodes)

    @property
    def num_actors(self) -> int:
        """How many messages are served at a time."""
        return len(self._actors)

    def add_actors_to_pool(self, num_actors: int) -> None:
        """Start the next actors, and return when they run.

        Raises:
            RuntimeError: they found no room; a message to such an actor would wait for ever, and Flower's end with it.
        """
        self._actors += map(self._new, self._nodes[self.num_actors :][:num_actors])
        running = [actor.__ray_ready__.remote() for actor in self._actors]
        _, missing = ray.wait(running, num_returns=len(running), timeout=PLACE_SECONDS)
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(running)} clients' processes do not run after {PLACE_SECONDS:g} s: something"
                " else took their room in the Ray cluster; start again when it is free"
            )

    def is_actor_available(self) -> bool:
        """Return whether there is one; Ray keeps the messages of one that is busy."""
        return bool(self._actors)

    def submit(self, actor_fn: Any, job: Job) -> Any:
        """Return the future of a message's answer, from the actor of its SuperNode."""
        app, message, supernode, context = job
        return actor_fn(self._actors[int(supernode) % len(self._actors)], app, message, supernode, context)

    def fetch_result_and_return_actor_to_pool(self, future: Any) -> tuple[Message, Context]:
        """Return the answer, and what the SuperNode remembers, once they are there."""
        _, reply, context = ray.get(future)
        return reply, context

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Do nothing: an actor is its SuperNode's, also one that died."""

    def terminate_all_actors(self) -> None:
        """End them, at once and whatever they do."""
        for actor in self._actors:
            ray.kill(actor)


def main() -> None:
    """Run ``flwr-simulation`` on the nodes that the file names."""
    nodes = json.loads(Path(sys.argv.pop(1)).read_text())
    vars(vce_api)["ThreadPoolExecutor"] = partial(ThreadPoolExecutor, max_workers=len(nodes))
    vars(raybackend)["BasicActorPool"] = partial(PlacedActors, nodes)
    flwr_simulation()


if __name__ == "__main__":
    main()
