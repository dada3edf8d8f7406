"""Federated methods, one module each; ``strategy.name`` is the name of a module that defines ``STRATEGY``."""

from importlib import import_module
from pkgutil import iter_modules

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from strategies.base import Strategy

__all__ = ["Strategy", "names", "strategy", "validate"]


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "base")


def strategy(name: str) -> type[Strategy]:
    """Return a method's class.

    Raises:
        FedjetsError: there is no such method.
    """
    if name not in names():
        raise FedjetsError(f"strategy.name = {name!r}: no such method; choose one of {', '.join(names())}")
    found: type[Strategy] = import_module(f"{__name__}.{name}").STRATEGY
    return found


def validate(config: Config) -> None:
    """Raise FedjetsError if there is no such method, or the settings make no sense for it."""
    strategy(config.strategy.name).validate(config)
