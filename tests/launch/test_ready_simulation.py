"""The simulation that waits for Flower: messages go out as they come."""

import inspect
import json
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.linkstate import LinkState

from fedjets_flwr.launch import ready_simulation
from fedjets_flwr.launch.daemons import kill_daemon, start_daemon
from fedjets_flwr.launch.own_ray import OwnRay
from fedjets_flwr.launch.simulation import LocalFlower
from fedjets_flwr.launch.stand_in import COMMAND


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


def test_the_command_that_flower_finds_passes_its_arguments_on_and_ends_with_the_simulation(tmp_path: Path) -> None:
    path = OwnRay(2).environment(tmp_path, "/usr/bin")["PATH"]
    with socket.socket(socket.AF_UNIX) as ready:
        ready.bind(str(tmp_path / "ready"))
        ready.listen(1)
        command = subprocess.Popen([Path(path.split(":")[0]) / COMMAND, "--token", "a b"])
        asking, _ = ready.accept()
        with asking, asking.makefile() as lines:
            assert json.loads(lines.readline()) == ["--token", "a b"]
            assert command.poll() is None
    assert command.wait(timeout=10) == 0


def test_where_no_command_runs_flower_starts_its_own_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    path = OwnRay(2).environment(tmp_path, "/usr/bin")["PATH"]
    assert path == "/usr/bin"
    assert OwnRay(2).ahead(tmp_path, path) == []


def test_an_engine_lives_as_long_as_all_its_daemons(tmp_path: Path) -> None:
    flower = LocalFlower(OwnRay(1))
    assert not flower.alive()  # none has started
    sleeper = ["sleep", "600"]
    flower.daemons = [start_daemon(sleeper, dict(os.environ), tmp_path, tmp_path / "log") for _ in range(2)]
    assert flower.alive()
    kill_daemon(flower.daemons[0])
    assert not flower.alive()
    flower.__exit__()
    assert all(daemon.poll() is not None for daemon in flower.daemons)
