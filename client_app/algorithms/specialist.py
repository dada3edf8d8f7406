"""The generalist is trained as in FedAvg; a client mixes it with a specialist of its own, which never leaves it."""

from collections.abc import Mapping

from torch import Tensor

from client_app.algorithms.fedavg import train
from client_app.client import Adapted, ClientContext
from client_app.participants import answering, fit_own, own_start
from fedjets_flwr.models.architectures import Architecture
from fedjets_flwr.moe.specialist import NLL, build_mixture, filled, mean_share
from fedjets_flwr.seeds import derive

__all__ = ["adapt", "train"]


def adapt(context: ClientContext, vectors: Mapping[str, Tensor]) -> Adapted:
    """Return the mixture: the specialist is trained alone (phase B), then with the gate (phase C).

    What comes out depends on the generalist, the client's samples and the seed, and on no round.
    """
    how, test, architecture = context.config.specialist, context.on("test"), context.runtime.architecture(0)
    assert isinstance(architecture, Architecture)
    specialist = own_start(context) if how.start == "scratch" else context.copy(0, vectors["expert.0"])
    fit_own(context, specialist)
    seed = derive(context.config.run.seed, "specialist's gate", context.client)
    mixture = build_mixture(architecture, context.config.moe.trainable, how, seed)
    model = filled(mixture, specialist.vector, vectors["expert.0"], context.device)
    fit_own(context, model, how.lr, NLL)
    share = mean_share(mixture, test.plain_inputs(), len(test.data))
    return Adapted(answering(model).predict, {"mixture": model.vector}, {"specialist-share": share})
