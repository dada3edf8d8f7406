"""Added to our app by the pfl benchmark: FedAvg on the 2-convolution CNN of pfl-research's CIFAR-10 benchmark.

One file for both sides of the app: as ``strategies/two_convolutions.py`` it is the strategy, as
``client_app/algorithms/two_convolutions.py`` the client algorithm; importing either makes the architecture known.
"""

from collections import OrderedDict

from torch import nn

from client_app.algorithms.fedavg import train
from fedjets_flwr.models import architectures
from fedjets_flwr.models.architectures import Architecture


def two_convolutions(a: Architecture) -> nn.Sequential:
    """Return pfl-research's ``simple_cnn`` for 32x32 images, ReLU after pooling: the same bits, less work."""
    layer1 = nn.Sequential(nn.Conv2d(a.channels, 32, 3), nn.ReLU(inplace=True))
    layer2 = nn.Sequential(nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Dropout(0.25))
    pool = nn.Sequential(nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(inplace=True), nn.Dropout(0.5))
    head = nn.Linear(128, a.num_classes)
    return nn.Sequential(OrderedDict(layer1=layer1, layer2=layer2, pool=pool, head=head))


architectures.BUILDERS["two-convolutions"] = two_convolutions

if __name__.startswith("strategies."):
    from strategies.fedavg import FedAvg

    STRATEGY = FedAvg

__all__ = ["train"]
