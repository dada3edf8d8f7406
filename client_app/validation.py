"""What a round's client says of the model that it receives, before it trains it: its loss on samples of its own."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from client_app.client import ClientContext, Update, Work
from fedjets_flwr.moe.early_stopping import looks, mean_loss


def looking(train: Work) -> Work:
    """Return a round's work that also tells the loss of the model that all share, where ``early-stopping.*`` asks."""

    def work(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Train; the loss is of the validation samples that the client shares, and left out if it is no number."""
        if not looks(context.config.early_stopping, context.server_round):
            return train(context, vectors)
        held, model = context.on("shared-val"), context.expert(0, vectors["expert.0"])
        loss = mean_loss(model, held.plain_inputs(), held.data.targets, context.task.total_loss, context.task.at_once)
        update = train(context, vectors)
        told = {"validation-loss": loss} if math.isfinite(loss) else {}
        return replace(update, numbers={**update.numbers, **told})

    return work
