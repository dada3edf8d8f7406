"""Local algorithms, one module each; the name of a module is the name of its train message's action.

Each has ``train(site, job, server_round, vectors) -> (vectors, numbers)``.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor

from client_app.client import Site
from fedjets_flwr.wire.messages import Job, Number

Train = Callable[[Site, Job, int, Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, Number]]]


def algorithms() -> dict[str, Train]:
    """Return every local algorithm by name."""
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").train for name in names}
