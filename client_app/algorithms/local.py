"""A model that each client trains alone, from a random start; nothing of it travels."""

from collections.abc import Mapping

from torch import Tensor

from client_app.client import Adapted, ClientContext
from client_app.participants import answering, fit_own
from fedjets_flwr.models.architectures import build, tail
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.seeds import derive


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Return the client's model: trained at the first call of a run, stopped early, and kept from then on."""
    if (kept := context.state.get("model")) is not None:
        return answering(context.expert(0, kept))
    start = build(context.runtime.architecture(0), derive(context.config.run.seed, "local", context.client))
    model = context.expert(0, FlatModel(tail(start, context.config.moe.trainable)).vector)
    fit_own(context, model)
    own = answering(model)
    return Adapted(own.predict, {"model": model.vector})
