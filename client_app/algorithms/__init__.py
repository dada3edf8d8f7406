"""Client algorithms, one module each; the name of a module is the name of its train message's action.

Each has ``train(context, vectors) -> Update``: what a client makes of the vectors that its job names.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor

from client_app.client import ClientContext, Update

Work = Callable[[ClientContext, Mapping[str, Tensor]], Update]
"""What a client does for a message: its context and the vectors it was sent -> its reply's content."""


def algorithms() -> dict[str, Work]:
    """Return every algorithm's ``train`` by name."""
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: import_module(f"{__name__}.{name}").train for name in names}
