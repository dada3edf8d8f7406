"""Added to our app by the transport benchmark: load every expert into its model, nudge it, send it back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import ClientContext, Update
from fedjets_flwr.names import expert_name


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Return the received experts, changed in one place, and the gate as it was."""
    experts = context.experts(vectors)
    with torch.no_grad():
        for expert in experts.values():
            expert.weights[-1] += 1e-3
    trained = {expert_name(m): expert.vector for m, expert in experts.items()}
    return Update(trained | {"gate": vectors["gate"]}, {"num-examples": len(context.data), "loss": 0.0})
