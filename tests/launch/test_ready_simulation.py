"""The simulation that waits for Flower: messages go out as they come."""

import inspect
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import LinkState

from fedjets_flwr.launch import ready_simulation


class State:
    """Holds messages by node as Flower's does, for one taker."""

    def __init__(self) -> None:
        self.held: dict[int, list[str]] = {1: [], 2: []}

    def store_message_ins(self, message: tuple[int, str]) -> str:
        self.held[message[0]].append(message[1])
        return message[1]

    def get_message_ins(self, node_id: int, limit: int) -> list[str]:
        found, self.held[node_id] = self.held[node_id][:limit], self.held[node_id][limit:]
        return found


@contextmanager
def handing_out(state: State) -> Iterator["Queue[str]"]:
    queue: Queue[str] = Queue()
    stopped = threading.Event()
    thread = threading.Thread(target=ready_simulation.hand_out, args=(state, queue, {1: 0, 2: 1}, stopped))
    thread.start()
    try:
        yield queue
    finally:
        stopped.set()
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_it_takes_the_place_of_flowers_own() -> None:
    assert list(inspect.signature(vce_api.add_messages_to_queue).parameters) == [
        "state", "queue", "nodes_mapping", "f_stop",
    ]  # fmt: skip
    assert list(inspect.signature(LinkState.store_message_ins).parameters) == ["self", "message"]
    assert {"node_id", "limit"} <= set(inspect.signature(LinkState.get_message_ins).parameters)


def test_a_message_waits_for_no_look() -> None:
    state, waits = State(), []
    with handing_out(state) as queue:
        for number in range(20):
            begun = time.monotonic()
            assert state.store_message_ins((1 + number % 2, f"{number}")) == f"{number}"
            assert queue.get(timeout=5) == f"{number}"
            waits.append(time.monotonic() - begun)
    assert statistics.median(waits) < ready_simulation.LOOK / 4


def test_several_messages_of_a_node_all_go_out_and_none_twice() -> None:
    state = State()
    state.held = {1: ["a", "b", "c"], 2: ["d"]}  # nobody was told of these
    with handing_out(state) as queue:
        assert sorted(queue.get(timeout=5) for _ in range(4)) == ["a", "b", "c", "d"]
        assert queue.empty()
