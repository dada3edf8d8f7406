"""FedProx (Li et al. 2020): FedAvg whose clients are pulled back towards the model that they received."""

from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg with the proximal term; ``fedprox.mu`` = 0 is FedAvg."""

    algorithm = "fedprox"


STRATEGY = FedProx
