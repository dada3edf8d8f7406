"""A trained run, opened from its folder alone: what personalising, reports and exports start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Spec
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import Architecture
from fedjets_flwr.models.common_expert import COMMON_EXPERT, CommonExpert, load_common_expert
from fedjets_flwr.models.expert import expert_architecture
from fedjets_flwr.names import expert_ids
from fedjets_flwr.runs.checkpoint import newest_vectors


class Serving(BaseModel):
    """How the run's method serves a client that never trained.

    Attributes:
        read_out: how its experts answer (a key of ``gating.READ_OUTS``) unless the settings say otherwise.
        routed: whether the gate picks ``moe.top-k`` experts; otherwise it is served all.
        architectures: of every expert, or of the model whose tail it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    read_out: Literal["top-1", "mixture", "blend", "mean"]
    routed: bool
    architectures: tuple[Architecture, ...]


_UNTOLD: dict[str, tuple[Literal["top-1", "mixture", "mean"], bool, str]] = {
    "fedavg": ("top-1", False, "common"),
    "fedprox": ("top-1", False, "common"),
    "scaffold": ("top-1", False, "common"),
    "ensembles": ("mean", False, "common"),
    "fedmix": ("mixture", False, ""),
    "fedjets": ("top-1", True, ""),
}
"""Read-out, routing and start of the experts by method, of runs whose summary does not yet tell."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's settings, results and models.

    Attributes:
        config: its settings; folders in it are those of the machine that ran it.
        summary: ``summary.json``.
        vectors: the newest checkpoint's: ``expert.0`` .., ``gate`` if the method has one, float32.
        common: its common expert.
        spec: classes and shape of the images.
        serving: how a client that never trained is served.
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    vectors: dict[str, Tensor]
    common: CommonExpert
    spec: Spec
    serving: Serving

    @property
    def num_experts(self) -> int:
        """Models that the run trained."""
        return len(expert_ids(self.vectors))


def open_run(folder: StrPath) -> TrainedRun:
    """Return the trained run in a folder.

    Raises:
        FedjetsError: it is no folder of a run, the run is not finished, or its files are damaged.
    """
    folder = Path(folder)
    try:
        config = Config.from_flat(json.loads((folder / "config.json").read_text()))
        summary = json.loads((folder / "summary.json").read_text())
        channels, height, width = map(int, summary["image_shape"])
        spec = Spec((channels, height, width), tuple(summary["classes"]))
    except FileNotFoundError as error:
        raise FedjetsError(f"{error.filename} is missing: {folder} is no finished run; end it with --resume") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedjetsError(f"{folder}: damaged, or of an older version ({error})") from None
    if not (folder / COMMON_EXPERT).is_file():
        raise FedjetsError(f"{folder}: no models in it; those of a deployed run are in its folder on the server")
    common, vectors = load_common_expert(folder / COMMON_EXPERT), newest_vectors(folder / "checkpoints")
    serving = _serving(summary, config, common, spec, len(expert_ids(vectors)), folder)
    return TrainedRun(folder, config, summary, vectors, common, spec, serving)


def _serving(
    summary: dict[str, Any], config: Config, common: CommonExpert, spec: Spec, experts: int, folder: Path
) -> Serving:
    try:
        if summary.get("serving", "") is None:
            raise FedjetsError(
                f"{folder}: strategy.name = {config.strategy.name!r} keeps no model at the server; every client has its"
                " own, and one that never trained cannot be served"
            )
        if "serving" in summary:
            found = Serving.model_validate_json(json.dumps(summary["serving"]))
            if len(found.architectures) != experts:
                raise ValueError(f"serving: {len(found.architectures)} architectures for {experts} experts")
            return found
        read_out, routed, init = _UNTOLD[config.strategy.name]
    except (ValidationError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise FedjetsError(f"{folder / 'summary.json'}: damaged, or of another version ({reason})") from None
    architecture = expert_architecture(config, common, spec, init or config.moe.init)
    return Serving(read_out=read_out, routed=routed, architectures=(architecture,) * experts)
