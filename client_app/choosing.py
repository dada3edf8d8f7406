"""A round's client that chooses its experts itself, where all of them lie in memory that it shares with the server.

One exchange in place of two: Flower takes a tenth of a second to hand one out, which small experts train in less than.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from client_app.client import ClientContext, Update, Work
from client_app.queries import chosen_experts
from fedjets_flwr.names import choice_name, expert_name


def choosing(train: Work) -> Work:
    """Return a round's work that begins with the gate's choice, where the job leaves it to the client."""

    def work(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
        """Train the chosen experts; tell which they are, and send them in the order of the choice."""
        if not context.job.choose:
            return train(context, vectors)
        experts = chosen_experts(context, vectors)
        update = train(replace(context, job=context.job.chosen(experts)), vectors)
        slots = {expert_name(m): choice_name(place) for place, m in enumerate(experts)}
        sent = {slots.get(name, name): vector for name, vector in update.vectors.items()}
        return replace(update, vectors=sent, numbers={**update.numbers, "experts": list(experts)})

    return work
