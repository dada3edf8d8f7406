"""FedAvg's local training (McMahan et al. 2017): plain cross entropy on each model that the client received."""

from collections.abc import Callable, Mapping

from torch import Tensor

from client_app.client import Site
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Sgd, batches, rate, train_supervised
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.wire.messages import Job, Number

Correction = Callable[[FlatModel], None]


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Train every model of the job by itself; return their vectors, the sample count and the mean loss."""
    names = [name for name in job.vectors if name.startswith("expert.")]
    models = site.experts([vectors[name] for name in names])
    losses = [
        train_one(site, job.client, server_round, int(name.removeprefix("expert.")), model)
        for name, model in zip(names, models, strict=True)
    ]
    trained = {name: model.vector for name, model in zip(names, models, strict=True)}
    return trained, {"num-examples": len(site.local(job.client)), "loss": sum(losses) / len(losses)}


def train_one(
    site: Site, client: int, server_round: int, member: int, model: FlatModel, correct: Correction | None = None
) -> float:
    """Train one model in place; return the mean loss.

    Args:
        site: the process.
        client: whose data.
        server_round: decides order of batches, augmentation and rate.
        member: which of several independent models; decides order and augmentation too.
        model: the model.
        correct: changes each gradient in place before its step.
    """
    c, local = site.config, site.local(client)
    ids = (server_round, client, member)
    order = batches(len(local), c.train.batch_size, c.train.local_epochs, torch_generator(c.run.seed, "batches", *ids))
    inputs = site.inputs(local, torch_generator(c.run.seed, "augment", *ids, device=site.device))
    optimizer = Sgd(model, rate(c.train, server_round, c.run.rounds), c.train.momentum, c.train.weight_decay)
    return train_supervised(model, inputs, local.labels, order, optimizer, correct, local.offset)
