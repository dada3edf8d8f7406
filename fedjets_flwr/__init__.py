"""FedJETs (arXiv 2306.08586): just-in-time personalisation with a federated mixture of experts, as a Flower app.

The public names are imported when they are first used: a deployed client's process serves one message, and importing
torch takes most of its time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedjets_flwr.config.schema import Config
    from fedjets_flwr.personalize.personaliser import Personaliser, personalise
    from fedjets_flwr.runs.trained_run import open_run

__version__ = "0.1.0"
__all__ = ["Config", "Personaliser", "open_run", "personalise"]

_HOMES = {
    "Config": "config.schema", "open_run": "runs.trained_run", "Personaliser": "personalize.personaliser",
    "personalise": "personalize.personaliser",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
