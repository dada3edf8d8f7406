"""SCAFFOLD's local training (Karimireddy et al. 2020): every gradient is corrected by c - c_i.

The server keeps all variates and sends the difference; of option II it computes the new variate itself, from the model
that comes back and the number of steps, so that nothing but the model travels up.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from client_app.algorithms.fedavg import train_one
from client_app.client import Site
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import steps_of
from fedjets_flwr.wire.messages import Job, Number


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Train ``expert.0``; with option I also return the full-batch gradient at the start, the new variate."""
    c, local = site.config, site.local(job.client)
    correction = vectors[f"correction.{job.client}"].to(site.device)

    def correct(model: FlatModel) -> None:
        for gradient, change in zip(model.gradients, changes, strict=True):
            gradient.add_(change)

    returned: dict[str, Tensor] = {}
    if c.scaffold.option == "I":
        returned[f"variate.{job.client}"] = _full_gradient(site, job.client, vectors["expert.0"])
    (model,) = site.experts([vectors["expert.0"]])
    changes = model.views(correction)
    loss = train_one(site, job.client, server_round, 0, model, correct)
    steps = steps_of(len(local), c.train.batch_size, c.train.local_epochs)
    return returned | {"expert.0": model.vector}, {"num-examples": len(local), "loss": loss, "steps": steps}


def _full_gradient(site: Site, client: int, vector: Tensor) -> Tensor:
    """Return the gradient of the mean loss over all local samples at ``vector``, in eval mode (statistics stay)."""
    local = site.local(client)
    (model,) = site.experts([vector])
    model.module.eval()
    model.zero_grad()
    inputs = site.inputs(local)
    for rows in torch.arange(len(local)).split(site.config.train.batch_size):
        logits = model.module(inputs(rows)) + local.offset
        F.cross_entropy(logits, local.labels[rows], reduction="sum").div(len(local)).backward()
    return torch.cat([gradient.flatten() for gradient in model.gradients])
