"""A finished run, opened from its folder alone: what personalising, reports and exports start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Dataset, no_images
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.common_expert import COMMON_EXPERT, CommonExpert, load_common_expert
from fedjets_flwr.runs.checkpoint import newest_vectors
from strategies import method


@dataclass(frozen=True)
class FinishedRun:
    """A run's settings, results and models.

    Attributes:
        config: its settings; folders in it are those of the machine that ran it.
        summary: ``summary.json``.
        vectors: the newest checkpoint's: ``expert.0`` .., ``gate`` if the method has one, float32.
        common: its common expert.
        task: classes and shape of the images, without images.
        init: how the method's experts started, which decides their architecture.
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    vectors: dict[str, Tensor]
    common: CommonExpert
    task: Dataset
    init: str

    @property
    def num_experts(self) -> int:
        """Models that the run trained."""
        return sum(name.startswith("expert.") for name in self.vectors)


def open_run(folder: StrPath) -> FinishedRun:
    """Return the finished run in a folder.

    Raises:
        FedjetsError: it is no folder of a run, the run is not finished, or its files are damaged.
    """
    folder = Path(folder)
    try:
        config = Config.from_flat(json.loads((folder / "config.json").read_text()))
        summary = json.loads((folder / "summary.json").read_text())
        images = no_images(tuple(summary["image_shape"]))
        task = Dataset(summary["dataset"], images, images, tuple(summary["classes"]), (), ())
    except FileNotFoundError as error:
        raise FedjetsError(f"{error.filename} is missing: {folder} is no finished run; end it with --resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedjetsError(f"{folder}: damaged, or of an older version ({error})") from None
    if not (folder / COMMON_EXPERT).is_file():
        raise FedjetsError(f"{folder}: no models in it; those of a deployed run are in its folder on the server")
    common = load_common_expert(folder / COMMON_EXPERT)
    init = method(config.strategy.name).init or config.moe.init
    return FinishedRun(folder, config, summary, newest_vectors(folder / "checkpoints"), common, task, init)
