"""Client algorithms, one module each; the name of a module is the name of its messages' action.

A module has one or more of

- ``train(context, vectors) -> Update``: what a client makes of the vectors that its job names, in a round;
- ``adapt(context, vectors) -> Adapted``: what it makes of them for its own predictions, before it is scored on its own
  test part; without one they answer as they came;
- ``query(context, vectors) -> Update``: what it answers when the method asks something before it plans a round.
"""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from client_app.client import Adapt, Work
from client_app.participants import as_received


@dataclass(frozen=True)
class Algorithm:
    """A method's client half; one that trains nothing in a round has no ``train``."""

    train: Work | None
    adapt: Adapt
    query: Work | None


def algorithms() -> dict[str, Algorithm]:
    """Return every algorithm by name."""
    modules = {module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)}
    return {
        name: Algorithm(
            getattr(module, "train", None),
            getattr(module, "adapt", as_received),
            getattr(module, "query", None),
        )
        for name, module in sorted(modules.items())
    }
