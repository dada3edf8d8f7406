"""FedMoE's control: every client holds as many experts as it may at first, drawn at random once, and they stay.

Clients tell nothing of their text but, with ``fedmoe.counts = "activated"``, which of their experts they used.
"""

from strategies.fedmoe import FedMoE


class RandomMoE(FedMoE):
    """FedMoE without its stages: random experts, the same averages."""

    @property
    def probe(self) -> str:
        """Nothing is found out."""
        return "none"

    @property
    def recommends(self) -> bool:
        """Nothing changes."""
        return False


STRATEGY = RandomMoE
