"""Grids whose clients answer badly, and small runs to meet them."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from torch import Tensor

import server_app.app
from client_app.runtime import open_runtime
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.in_process import Finished, InProcessGrid, configure, run_in_process

SMALL: dict[str, Scalar] = {
    "run__rounds": 3, "run__evaluate_every": 3, "partition__clients": 12, "partition__unseen_clients": 3,
    "partition__samples_per_client": 40, "cohort__normals": 4, "common_expert__target_accuracy": 0.3,
    "moe__init": "common", "transport__name": "inline", "adapt__max_epochs": 6,
}  # fmt: skip

EIGHT: dict[str, Scalar] = {
    "run__rounds": 8, "run__evaluate_every": 4, "run__checkpoint_every": 1, "partition__samples_per_client": 20,
    "cohort__anchors": 1, "cohort__normals": 2, "train__momentum": 0.0,
}  # fmt: skip

Tamper = Callable[[str, int, RecordDict], str | None]
"""Changes the content of a reply in place, given its message type and round; a text turns it into an error reply."""


class OneClientANode(InProcessGrid):
    """As many nodes as a round has clients, so that each client answers in a message of its own."""

    nodes = 15
    node = 1
    server_round = 0

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.nodes + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            self.node = message.metadata.dst_node_id
            self.server_round = int(message.content.config_records["request"].get("round", 0))  # type: ignore[arg-type]
            ids += super().push_messages([message])
        return ids

    def change(self, reply: Message) -> Message:
        return as_from(reply, reply.metadata.reply_to_message_id, self.node)


def as_from(reply: Message, asked: str, node: int) -> Message:
    """Set what Flower sets of a reply."""
    vars(reply.metadata).update(_reply_to_message_id=asked, _src_node_id=node)
    return reply


def tampering(tamper: Tamper) -> type[InProcessGrid]:
    """Return a grid that changes replies."""

    class Tampering(OneClientANode):
        def change(self, reply: Message) -> Message:
            reply = super().change(reply)
            reason = tamper(reply.metadata.message_type, self.server_round, reply.content)
            if reason is None:
                return reply
            failed = Message(Error(1, reason), reply_to=reply)
            return as_from(failed, reply.metadata.reply_to_message_id, self.node)

    return Tampering


def clients_of(content: RecordDict) -> list[int]:
    """Return whose answers a reply holds."""
    return [int(name.removeprefix("client.")) for name in content.metric_records if name.startswith("client.")]


class Runner:
    """Starts small runs below one folder; plots, which cost more than the rounds, are left out."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_app.app, "draw_or_say", lambda folder, say: None)
        self.folder, self.cache, self.monkeypatch = folder, cache, monkeypatch
        self.numbers = itertools.count()

    def __call__(self, grid: type[InProcessGrid] = OneClientANode, /, **changes: Scalar) -> Finished:
        return run_in_process(self.folder, self.monkeypatch, grid, **self._settings(changes))

    def main(self, grid: type[InProcessGrid], /, **changes: Scalar) -> None:
        """Do all that the ServerApp does: what it says of a run that ends with an exception, too."""
        started = grid(configure(self.folder, self.monkeypatch, **self._settings(changes)))
        started.context.run_id = next(self.numbers)
        server_app.app.main(started, started.context)

    def _settings(self, changes: dict[str, Scalar]) -> dict[str, Scalar]:
        open_runtime.cache_clear()  # a kept site would leave the server's number of threads to the clients' training
        own: dict[str, Scalar] = {"run__cache_dir": str(self.cache), "run__name": f"run{next(self.numbers)}"}
        return SMALL | own | changes


def same_weights(a: Finished, b: Finished) -> bool:
    """Return whether two runs ended with the same bits."""
    return a.vectors.keys() == b.vectors.keys() and all(same(a.vectors[name], b.vectors[name]) for name in a.vectors)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two vectors have the same bits."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def all_weights_finite(method: Finished) -> bool:
    """Return whether the state has neither NaN nor infinity."""
    return all(bool(torch.isfinite(vector).all()) for vector in method.vectors.values())


def failures(method: Finished) -> list[dict[str, str]]:
    """Return the failures of each round by client id."""
    return [record["failures"] for record in read_metrics(method.config.run_dir)]


def checkpointed(run: Runner, name: str) -> list[int]:
    """Return the rounds of a run's checkpoints."""
    folder = run.folder / "runs" / name / "checkpoints"
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("round-*.safetensors"))
