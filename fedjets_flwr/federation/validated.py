"""The rule ``validated``: clipped updates, judged by labelled samples that no client holds.

What a client makes of an expert is judged alone: before it comes here (:meth:`Judge.check`), and by what it weighs
(:meth:`Judge.trust`). A gate cannot be: trained by one client it sends everything to that client's experts, and only
with the others' is it of use. So the server goes on where the clients' average ends, and trains the gate for a few
steps on the samples that it judges by.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Aggregation
from fedjets_flwr.federation.aggregation import Robust, clip_shares
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.names import expert_ids

GATE = "gate"


class Validated(Robust):
    """Means of clipped updates, of experts by the judge's trust; the gate's is trained on, among the new experts."""

    def __init__(self, old: Mapping[str, Tensor], settings: Aggregation, judge: Judge) -> None:
        super().__init__(old, settings)
        self._judge = judge
        self._trust: dict[str, list[float]] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Hold one client's update, unless the judge gives it no say."""
        trust = math.prod(self._judge.trust(expert, vector, self._old[name]) for expert in expert_ids([name]))
        if weight and trust:
            self._trust.setdefault(name, []).append(trust)
            super().add(name, vector, weight)

    def result(self) -> dict[str, Tensor]:
        """Return old + mean update, for the gate with what the server's own steps add."""
        combined = super().result()
        if GATE in combined:
            combined[GATE] = self._judge.train_gate({**self._old, **combined})
        return combined

    def _combine(self, name: str, updates: Tensor, bound: float) -> Tensor:
        trust = torch.tensor(self._trust[name], dtype=torch.float64)
        shares = clip_shares(updates, bound) * trust / trust.sum()
        combined: Tensor = (shares.float().unsqueeze(1) * updates).sum(dim=0)
        return combined
