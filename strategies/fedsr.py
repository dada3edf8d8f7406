"""FedSR (Nguyen et al. 2022): one model whose representation is simple, for clients that nobody has seen.

FedJETs' Table 8 compares with it. Started from the common expert, which the bottleneck leaves as it is.
"""

from dataclasses import replace

from fedjets_flwr.models.architectures import Architecture
from strategies.fedavg import FedAvg


class FedSR(FedAvg):
    """FedAvg's rounds with equal weights; clients keep a reference of their own for each class."""

    algorithm = "fedsr"
    keeps_state = True
    equal_weights = True  # as in the authors' code

    def architecture(self, expert: int) -> Architecture:
        """Return the common expert's with a stochastic bottleneck; without one for FedL2R."""
        return replace(super().architecture(expert), neck="gaussian" if self.config.fedsr.stochastic else "")


STRATEGY = FedSR
