"""FedProx's local training (Li et al. 2020): cross entropy + mu/2 ||w - w_t||^2."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.algorithms.fedavg import train_one
from client_app.client import Site
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.wire.messages import Job, Number


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Train ``expert.0``; the proximal term is on weights only, not on batch-norm statistics."""
    start = vectors["expert.0"].to(site.device)
    mu = site.config.fedprox.mu
    (model,) = site.experts([start])
    anchored = model.views(start[: model.layout.trained])

    def pull_back(model: FlatModel) -> None:
        with torch.no_grad():
            for gradient, weight, old in zip(model.gradients, model.parameters, anchored, strict=True):
                gradient.add_(weight - old, alpha=mu)

    loss = train_one(site, job.client, server_round, 0, model, pull_back)
    return {"expert.0": model.vector}, {"num-examples": len(site.local(job.client)), "loss": loss}
