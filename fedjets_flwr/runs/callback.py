"""What wants to know how a run goes: the tracker, checkpoints, TensorBoard, or a callback of your own.

One's own is any callable ``(config) -> Callback`` that an installed package names as an entry point of the group
``fedjets.callbacks``; no setting names it, and nothing here changes for it::

    [project.entry-points."fedjets.callbacks"]
    mine = "my_package:MyCallback"
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fedjets_flwr.config.schema import Config

if TYPE_CHECKING:  # the launcher reads results, and must not wait for torch
    from torch import Tensor

GROUP = "fedjets.callbacks"


class Callback:
    """Told of every round, in the server's process, in the order in which callbacks were given; the default is deaf."""

    def on_round(self, record: Mapping[str, Any], vectors: "Mapping[str, Tensor]") -> None:
        """A round is done.

        Args:
            record: what ``metrics.jsonl`` says of it: ``round``, ``loss``, ``evaluation``, ``seconds``, …
            vectors: the state after it, float32 by name; the next rounds may write over it.
        """

    def on_broken_off(self, server_round: int, vectors: "Mapping[str, Tensor]") -> None:
        """The run ends early; ``vectors`` are the state after ``server_round``, the last one that was done."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is done; ``summary`` is what ``summary.json`` says."""


def installed_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks of other packages, in the order of their names."""
    return [entry.load()(config) for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)]
