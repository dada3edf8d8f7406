"""A stock Flower app: flwr's own FedAvg, state dicts as its quickstart sends them.

Its best honest setting: model and data are made once per process and kept, nothing is evaluated, one torch thread for
each of as many processes as there are cores. ``task`` is ``move`` (load a ResNet-34, nudge it, send it back),
``move-resnet8`` or ``move-head`` (the same with the ResNet-8 or linear head of our digits, of a ``width``), or
``cifar10`` (pfl-research's benchmark).
"""

import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedjets_flwr.models.architectures import Architecture, build

server = ServerApp()
client = ClientApp()


def simple_cnn() -> nn.Module:
    """The 2-convolution CNN of pfl-research's CIFAR-10 benchmark."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "cifar10": lambda width: simple_cnn(),
    "move": lambda width: torchvision.models.resnet34(),
    "move-quick": lambda width: torchvision.models.resnet18(),
    "move-resnet8": lambda width: build(Architecture("resnet8", width, "batch", "cifar", 1, 10), 0),
    "move-head": lambda width: nn.Linear(width, 10),
}


@lru_cache(maxsize=1)
def model_of(task: str, width: int) -> nn.Module:
    """Return this process's model."""
    torch.manual_seed(0)
    return MODELS[task](width)


@lru_cache(maxsize=1)
def data_of(path: str) -> tuple[Tensor, Tensor]:
    """Return this process's normalised images and labels."""
    images, labels = (np.load(Path(path) / f"{name}.npy", mmap_mode="c") for name in ("images", "labels"))
    return torch.from_numpy(images), torch.from_numpy(labels)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train on the 50 images of this partition, or only touch the model."""
    c = context.run_config
    torch.set_num_threads(int(c["threads"]))
    model = model_of(str(c["task"]), int(c.get("width", 0)))
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    samples = 1
    if c["task"] == "cifar10":
        images, labels = data_of(str(c["data"]))
        samples = int(c["samples"])
        start = int(context.node_config["partition-id"]) * samples
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        for rows in (start + torch.randperm(samples)).split(10):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    else:
        with torch.no_grad():
            list(model.parameters())[-1].add_(1e-3)
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": samples})}
    )
    return Message(content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that tells how long its average took, and how many clients failed."""

    seconds, failures = 0.0, 0

    def aggregate_train(self, server_round: int, replies):  # type: ignore[no-untyped-def]
        """Average as FedAvg does."""
        replies = list(replies)
        self.failures = sum(reply.has_error() for reply in replies)
        begun = time.monotonic()
        result = super().aggregate_train(server_round, replies)
        self.seconds = time.monotonic() - begun
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds without end, and write a line for each."""
    c = context.run_config
    lines = Path(str(c["lines"]))
    strategy = Timed(
        fraction_train=float(c["fraction"]), fraction_evaluate=0.0, min_train_nodes=1, min_evaluate_nodes=0,
        min_available_nodes=int(c["nodes"]),
    )  # fmt: skip

    def line(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round:
            with lines.open("a") as file:
                record = {"round": server_round, "aggregate": strategy.seconds, "failures": strategy.failures}
                file.write(json.dumps(record) + "\n")
        return None

    arrays = ArrayRecord(model_of(str(c["task"]), int(c.get("width", 0))).state_dict())
    strategy.start(grid, arrays, num_rounds=1_000_000, evaluate_fn=line)
