"""FedAvg's local training, and a copy of the global model that each client fine-tunes for itself."""

from collections.abc import Mapping

from torch import Tensor

from client_app.algorithms.fedavg import train
from client_app.client import Adapted, ClientContext
from client_app.participants import answering, fit_own

__all__ = ["adapt", "train"]


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Train the global model on the client's own samples, stopped early; it stays with the client."""
    model = context.expert(0, vectors["expert.0"])
    fit_own(context, model)
    return answering(model)
