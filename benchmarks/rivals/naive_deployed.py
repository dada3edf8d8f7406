"""A mixture of experts on stock Flower, as its quickstart sends models: one array per tensor, everything to everybody.

flwr's own FedAvg draws the clients and averages; each trains all experts and the gate on its own images.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedjets_flwr.data.image_folder import read_folder
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.gate import build_gate

server = ServerApp()
client = ClientApp()


def models(context: Context) -> nn.ModuleDict:
    """Return M experts and the gate, of the same shapes as ours."""
    c = context.run_config
    architecture = Architecture(
        str(c["model"]), int(c["width"]), "batch", "cifar", int(c["channels"]), len(str(c["classes"]).split(","))
    )
    experts = {f"expert{m}": build(architecture, m) for m in range(int(c["experts"]))}
    return nn.ModuleDict({**experts, "gate": build_gate(int(c["inputs"]), 128, len(experts), 0)})


def received(message: Message, context: Context) -> tuple[nn.ModuleDict, Tensor, Tensor]:
    """Return the models that a message brings, and this site's images."""
    torch.set_num_threads(1)
    c = context.run_config
    net = models(context)
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    shape = (int(c["channels"]), int(c["size"]), int(c["size"]))
    images = read_folder(Path(str(context.node_config["data-path"])), tuple(str(c["classes"]).split(",")), shape).images
    return net, images.pixels.float() / 255, images.labels


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train every expert for an epoch; the gate goes along."""
    net, pixels, labels = received(message, context)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for rows in torch.randperm(len(labels)).split(32):
        loss = sum(
            F.cross_entropy(module(pixels[rows]), labels[rows]) for name, module in net.items() if name != "gate"
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(RecordDict(content), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Reply with the mean of the experts."""
    net, pixels, labels = received(message, context)
    net.eval()
    with torch.no_grad():
        mean = torch.stack([module(pixels) for name, module in net.items() if name != "gate"]).mean(dim=0)
    right = int((mean.argmax(dim=1) == labels).sum())
    metrics = MetricRecord({"num-examples": len(labels), "accuracy": right / len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg; a line for the time of each round."""
    c = context.run_config
    nodes, trained, evaluated = int(c["nodes"]), int(c["trained"]), int(c["evaluated"])
    strategy = FedAvg(
        fraction_train=trained / nodes, fraction_evaluate=evaluated / nodes, min_train_nodes=trained,
        min_evaluate_nodes=evaluated, min_available_nodes=nodes,
    )  # fmt: skip
    arrays = ArrayRecord(models(context).state_dict())

    def line(server_round: int, _: ArrayRecord) -> None:
        with Path(str(c["lines"])).open("a") as file:
            size = {"arrays": len(arrays), "bytes": sum(len(a.data) for a in arrays.values())}
            file.write(json.dumps({"round": server_round, "time": time.time()} | size) + "\n")

    strategy.start(grid, arrays, num_rounds=int(c["rounds"]), timeout=3600, evaluate_fn=line)
