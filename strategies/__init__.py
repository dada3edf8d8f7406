"""Federated methods, one module each; ``strategy.name`` is the name of a module that defines ``METHOD``."""

from importlib import import_module
from pkgutil import iter_modules

from fedjets_flwr.errors import FedjetsError
from strategies.base import Method

__all__ = ["Method", "method", "names"]


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "base")


def method(name: str) -> type[Method]:
    """Return a method's class.

    Raises:
        FedjetsError: there is no such method.
    """
    if name not in names():
        raise FedjetsError(f"strategy.name = {name!r}: no such method; choose one of {', '.join(names())}")
    found: type[Method] = import_module(f"{__name__}.{name}").METHOD
    return found
