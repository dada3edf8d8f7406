"""Added to our app by the transport benchmark: load every expert into its model, nudge it, send it back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import Site
from fedjets_flwr.wire.messages import Job, Number


def train(
    site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    """Return the received experts, changed in one place, and the gate as it was."""
    names = [name for name in job.vectors if name != "gate"]
    experts = site.experts([vectors[name] for name in names])
    with torch.no_grad():
        for expert in experts:
            expert.weights[-1] += 1e-3
    trained = {name: expert.vector for name, expert in zip(names, experts, strict=True)}
    return trained | {"gate": vectors["gate"]}, {"num-examples": len(site.local(job.client)), "loss": 0.0}
