"""FedProx (Li et al. 2020): FedAvg whose clients are pulled back towards the model that they received."""

from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg with the proximal local loop; ``fedprox.mu`` = 0 is FedAvg."""

    local = "fedprox"


METHOD = FedProx
