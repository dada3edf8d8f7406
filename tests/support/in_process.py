"""Runs the real ServerApp and ClientApp in this process: Flower's records and messages, no Ray, no SuperLink.

For tests that compare many runs bit by bit; whole runs through the real engine are in ``test_end_to_end.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from client_app.app import app as client_app
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.wire import nodes
from fedjets_flwr.wire.exchange import Exchange
from server_app.app import run
from server_app.rounds import Rounds
from strategies import Strategy

NODE = 7


class InProcessGrid(Grid):
    """One node that can run any client."""

    simulated = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.context = Context(1, NODE, {"partition-id": 0}, RecordDict(), config.flat())
        self.replies: dict[str, Message] = {}
        self.sent = 0

    def get_node_ids(self) -> list[int]:
        return [NODE]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            self.sent += 1
            name = str(self.sent)
            vars(message.metadata)["_message_id"] = name
            reply = self.answer(message)
            vars(reply.metadata).update(_reply_to_message_id=name, _src_node_id=NODE)
            self.replies[name] = self.change(reply)
            ids.append(name)
        return ids

    def answer(self, message: Message) -> Message:
        """Return what a node answers."""
        return client_app(message, self.context)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]

    def change(self, reply: Message) -> Message:
        """What arrives at the server; tests of bad replies override it."""
        return reply

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    run = property(lambda self: None)
    create_message = send_and_receive = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Finished:
    """A run that is done: its rounds, and the checkpoints that hold its lock."""

    rounds: Rounds
    checkpoints: Checkpoints

    @property
    def config(self) -> Config:
        return self.rounds.config

    @property
    def vectors(self) -> dict[str, Tensor]:
        return self.rounds.strategy.vectors

    @property
    def strategy(self) -> Strategy:
        return self.rounds.strategy

    @property
    def anchors(self) -> tuple[int, ...]:
        return self.rounds.strategy.anchors

    @property
    def num_samples(self) -> dict[int, int]:
        return self.rounds.strategy.num_samples

    @property
    def exchange(self) -> Exchange:
        return self.rounds.exchange

    def let_go(self) -> None:
        """Do as if the process had ended."""
        self.checkpoints.close()


def run_in_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, grid: type[InProcessGrid] = InProcessGrid, **changes: Scalar
) -> Finished:
    """Do a run of the given settings (``moe__top_k=2`` means ``moe.top-k = 2``)."""
    config = configure(folder, monkeypatch, **changes)
    monkeypatch.setattr(ray, "is_initialized", lambda: grid.simulated)
    checkpoints = Checkpoints(config)
    return Finished(run(grid(config), config, checkpoints), checkpoints)


def configure(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Scalar) -> Config:
    """Return the settings of a run in this process, which is made ready for it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    torch.set_num_threads(1)  # as a client's process has: sums of two threads round otherwise
    # Threads of the server would be the tests' own from then on; and a process that is forked from it waits for them.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(nodes, "SETTLE_SECONDS", 0.0)  # the nodes of a grid in this process are there at once
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    flat: dict[str, Scalar] = {"run.output-dir": str(folder / "runs"), "run.cache-dir": str(folder / "cache")}
    return Config.from_flat(flat | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})
