"""What each method needs of the settings, for tests that go over all methods."""

import strategies
from client_app.algorithms import algorithms
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.config.sources import read_preset
from strategies.base import IMAGES


def needed(name: str) -> dict[str, Scalar]:
    """Return a method, and what its preset says of the clients' data (``partition__test_share=..``)."""
    preset = {key: value for key, value in read_preset(name).items() if key.startswith("partition.")}
    return {"strategy__name": name} | {k.replace(".", "__").replace("-", "_"): v for k, v in preset.items()}


OF_TEXT = [name for name in strategies.names() if IMAGES not in strategies.strategy(name).learns]
"""Methods that need text; the others learn images."""
TRAINED = [
    name
    for name in strategies.names()
    if algorithms()[strategies.strategy(name).algorithm].train and name not in OF_TEXT
]
"""Methods of images that have rounds to do."""
SERVED = [name for name in strategies.names() if strategies.strategy(name).serves_unseen and name not in OF_TEXT]
"""Methods of images that serve a client which never trained."""
