"""The rule ``validated``: clipped updates, judged by labelled samples that no client holds.

What a client makes of an expert is judged alone, before it comes here (:meth:`Judge.check`). A gate cannot be: trained
by one client it sends everything to that client's experts, and only with the others' is it of use. So the server goes
on where the clients' average ends, and trains the gate for a few steps on the samples that it judges by.
"""

from collections.abc import Mapping

from torch import Tensor

from fedjets_flwr.config.sections import Aggregation
from fedjets_flwr.federation.aggregation import Robust
from fedjets_flwr.federation.judge import Judge

GATE = "gate"


class Validated(Robust):
    """Means of clipped updates; the gate's is trained on at the server, among the new experts."""

    def __init__(self, old: Mapping[str, Tensor], settings: Aggregation, judge: Judge) -> None:
        super().__init__(old, settings)
        self._judge = judge

    def result(self) -> dict[str, Tensor]:
        """Return old + mean update, for the gate with what the server's own steps add."""
        combined = super().result()
        if GATE in combined:
            combined[GATE] = self._judge.train_gate({**self._old, **combined})
        return combined
