"""Scalars of every round as TensorBoard events below ``<run>/tensorboard``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import reason
from fedjets_flwr.runs.callback import Callback


class TensorBoard(Callback):
    """Writes loss, accuracy, score, gate entropy and seconds; needs the extra ``tensorboard``."""

    def __init__(self, folder: Path) -> None:
        """Begin.

        Raises:
            FedjetsError: the extra is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise FedjetsError(
                f"run.tensorboard = true: {reason(error)}; pip install 'fedjets-flwr[tensorboard]', or set it to false"
            ) from None

        self._writer = SummaryWriter(folder / "tensorboard")

    def on_round(self, record: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
        """Write the scalars of a round."""
        for name, value in scalars_of(record).items():
            self._writer.add_scalar(name, value, record["round"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Flush the events."""
        self._writer.close()


def scalars_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalars of a round's record by the names under which they are drawn."""
    scalars = {"loss": record["loss"]} | {f"seconds/{name}": value for name, value in record["seconds"].items()}
    scalars |= record.get("metrics", {})
    for kind, where in (("evaluation", ""), ("validation", "validation/")):
        if kind in record:
            scalars |= {where + name: record[kind][name] for name in ("accuracy", "gate_entropy")}
    return scalars | ({"score": record["score"]["value"]} if "score" in record else {})
