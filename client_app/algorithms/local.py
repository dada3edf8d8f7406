"""A model that each client trains alone, from a random start; nothing of it travels."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from client_app.client import Adapted, ClientContext
from client_app.participants import answering, fit_own, own_start


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Return the client's model: trained at the first call of a run, stopped early, and kept from then on."""
    if (kept := context.state.get("model")) is not None:
        return answering(context.expert(0, kept))
    model = own_start(context)
    fit_own(context, model)
    return replace(answering(model), state={"model": model.vector})
