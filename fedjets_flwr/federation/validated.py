"""The rule ``validated``: clipped updates, judged by labelled samples that no client holds.

What a client makes of an expert is judged alone, before it comes here (:meth:`Judge.check`). A gate cannot be: trained
by one client it sends everything to that client's experts, and only with the others' is it of use. So a client's gate
is judged by what becomes of the average without it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Aggregation
from fedjets_flwr.federation.aggregation import Robust, clip_shares
from fedjets_flwr.federation.judge import Judge

GATE = "gate"


class Validated(Robust):
    """Means of clipped updates; those of the gate without the clients that harm the mixture of the new experts."""

    def __init__(self, old: Mapping[str, Tensor], settings: Aggregation, judge: Judge) -> None:
        super().__init__(old, settings)
        self._judge = judge

    def result(self) -> dict[str, Tensor]:
        """Return old + mean update; the counts are of those that had a part in it."""
        bound = self.bounds().get(GATE, 0.0)
        gates = self._updates.pop(GATE, [])
        combined = super().result()
        if gates:
            combined[GATE] = self._gate(torch.stack(gates), bound, {**self._old, **combined})
        return combined

    def _gate(self, updates: Tensor, bound: float, vectors: Mapping[str, Tensor]) -> Tensor:
        updates = clip_shares(updates, bound).float().unsqueeze(1) * updates
        loss_of = self._judge.gate_loss(vectors)

        def gate(rows: Sequence[int]) -> Tensor:
            return self._old[GATE] + updates[list(rows)].mean(dim=0)

        kept = harmless(lambda rows: loss_of(gate(rows)), len(updates), self._settings.gate_margin)
        self.counts[GATE] = len(kept)
        return gate(kept)


def harmless(loss: Callable[[Sequence[int]], float], count: int, margin: float) -> list[int]:
    """Return which of ``count`` members do a group no harm; one at least.

    Whoever harms the group most is left out, again and again, as long as its loss falls by more than a share ``margin``
    (reject on negative impact, Barreno et al. 2010).

    Args:
        loss: of a group, by its members' numbers.
        count: members, 0 .. count - 1.
        margin: at least 0; what honest members do to the loss by chance.
    """
    kept, now = list(range(count)), loss(range(count))
    while len(kept) > 1:
        without, member = min((loss([other for other in kept if other != member]), member) for member in kept)
        if without >= (1 - margin) * now:
            break
        kept.remove(member)
        now = without
    return kept
