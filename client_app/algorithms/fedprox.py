"""FedProx's local training (Li et al. 2020): cross entropy + mu/2 ||w - w_t||^2."""

from collections.abc import Mapping

import torch
from torch import Tensor

from client_app.client import ClientContext, Update
from client_app.training import train_one


def train(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train ``expert.0``; the proximal term is on weights only, not on batch-norm statistics."""
    start = vectors["expert.0"].to(context.device)
    model = context.expert(0, start)
    anchored = model.views(start[: model.spec.trained])

    def pull_back() -> None:
        with torch.no_grad():
            for gradient, weight, old in zip(model.gradients, model.parameters, anchored, strict=True):
                gradient.add_(weight - old, alpha=context.config.fedprox.mu)

    loss = train_one(context, model, correct=pull_back)
    return Update({"expert.0": model.vector}, {"num-examples": len(context.data), "loss": loss})
