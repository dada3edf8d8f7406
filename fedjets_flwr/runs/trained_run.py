"""A trained run, opened from its folder alone: what personalising, reports and exports start from."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Model
from fedjets_flwr.data.datasets import Spec
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.common_expert import COMMON_EXPERT, CommonExpert, load_common_expert
from fedjets_flwr.models.expert import expert_architecture
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.names import expert_ids, expert_name
from fedjets_flwr.printable import reason
from fedjets_flwr.runs.checkpoint import newest_vectors
from fedjets_flwr.runs.records import SETTINGS_TOLD, ClientId, Count, SummaryTold, read_told

SUMMARY = "summary.json"


def _different(classes: list[str]) -> list[str]:
    if len(set(classes)) < len(classes):
        raise ValueError("classes of the same name")
    return classes


def _image(shape: list[int]) -> list[int]:
    if len(shape) != 3 or shape[0] not in (1, 3) or not all(4 <= side <= 1024 for side in shape[1:]):
        raise ValueError("no shape of images")
    return shape


class TrainedTold(SummaryTold):
    """What a summary must tell of models that are to be used."""

    dataset: str
    rounds: Count
    weights_hash: str
    classes: Annotated[list[str], Field(min_length=1), AfterValidator(_different)]
    image_shape: Annotated[list[Count], AfterValidator(_image)]
    usual: dict[ClientId, Annotated[float, Field(ge=0, le=100)]] = {}


class Serving(BaseModel):
    """How the run's method serves a client that never trained.

    Attributes:
        read_out: how its experts answer (a key of ``gating.READ_OUTS``) unless the settings say otherwise.
        routed: whether the gate picks ``moe.top-k`` experts; otherwise it is served all.
        architectures: of every expert, or of the model whose tail it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    read_out: Literal["top-1", "mixture", "blend", "mean", "surest", "familiar"]
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
    def usual(self) -> dict[int, float]:
        """How sure experts are of their anchors' samples, in nats of mean entropy, by expert; empty: nobody told."""
        return {int(expert): nats for expert, nats in self.summary.get("usual", {}).items()}

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
    config = written_settings(folder)
    if config.of_text:
        raise FedjetsError(
            f"{folder}: data.name = {config.data.name!r}: a run of language models; `fedjets personalize --text` makes"
            " one for a text, and nothing else can be done with it"
        )
    summary = told(folder, SUMMARY, TrainedTold)
    channels, height, width = summary["image_shape"]
    spec = Spec((channels, height, width), tuple(summary["classes"]))
    if not (folder / COMMON_EXPERT).is_file():
        raise FedjetsError(f"{folder}: no models in it; those of a deployed run are in its folder on the server")
    common, vectors = load_common_expert(folder / COMMON_EXPERT), vectors_in(folder / "checkpoints")
    serving = _serving(summary, config, common, spec, len(expert_ids(vectors)), folder)
    run = TrainedRun(folder, config, summary, vectors, common, spec, serving)
    _check_fit(run)
    return run


def written_settings(folder: Path) -> Config:
    """Return the settings in a run's folder.

    Raises:
        FedjetsError: it is no folder of a finished run.
    """
    return Config.from_flat(told(folder, "config.json", SETTINGS_TOLD))


def told(folder: Path, name: str, kind: Any) -> dict[str, Any]:
    """Return what a file of a finished run's folder tells.

    Raises:
        FedjetsError: it is not there, or not of its kind.
    """
    value = read_told(folder / name, kind)
    if value is None:
        raise FedjetsError(f"{folder / name} is missing: {folder} is no finished run; end it with --resume")
    return value


def vectors_in(folder: Path) -> dict[str, Tensor]:
    """Return the models of the newest checkpoint, whose digest anybody can write.

    Raises:
        FedjetsError: they are damaged.
    """
    try:
        vectors = newest_vectors(folder)
        if sorted(expert_ids(vectors)) != list(range(len(expert_ids(vectors)))):
            raise ValueError("not all experts")
        if not all(v.dtype == torch.float32 and v.dim() == 1 and bool(v.isfinite().all()) for v in vectors.values()):
            raise ValueError("vectors that are no finite numbers")
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise FedjetsError(f"{folder}: damaged ({reason(error)})") from None
    return vectors


def _check_fit(run: TrainedRun) -> None:
    """Raise FedjetsError unless common expert, experts, classes and images fit each other; no memory is taken."""
    moe, common = run.config.moe, run.common.architecture
    if run.num_experts == 0:
        raise FedjetsError(f"{run.folder}: damaged: no experts in its newest checkpoint")
    for expert, architecture in enumerate(run.serving.architectures):
        if (architecture.num_classes, architecture.channels) != (len(run.spec.classes), run.spec.shape[0]):
            raise FedjetsError(f"{run.folder}: damaged: experts of other classes or images than {SUMMARY} says")
        if moe.trainable != "all" and replace(architecture, neck="") != common:
            raise FedjetsError(f"{run.folder}: damaged: experts of another architecture than their common expert")
        if _size(architecture, moe.trainable) != run.vectors[expert_name(expert)].numel():
            raise FedjetsError(f"{run.folder}: damaged: {expert_name(expert)} is not of the architecture that it names")
    if (common.num_classes, common.channels) != (len(run.spec.classes), run.spec.shape[0]):
        raise FedjetsError(f"{run.folder}: damaged: a common expert of other classes or images than {SUMMARY} says")
    if run.serving.routed and not ("gate" in run.vectors and moe.top_k <= run.num_experts):
        raise FedjetsError(f"{run.folder}: damaged: its experts cannot be chosen; no gate, or fewer than moe.top-k")


def _size(a: Architecture, trainable: str) -> int:
    """Return the floats of an expert; 0 if there is no such model."""
    try:
        Model.model_validate({"name": a.name, "width": a.width, "norm": a.norm, "stem": a.stem})
        with torch.device("meta"):
            return VectorSpec.of(tail(build(a, 0), trainable)).size
    except (LookupError, ValueError, ArithmeticError, TypeError, RuntimeError):
        return 0


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
        raise FedjetsError(f"{folder / 'summary.json'}: damaged, or of another version ({reason(error)})") from None
    architecture = expert_architecture(config, common, spec, init or config.moe.init)
    return Serving(read_out=read_out, routed=routed, architectures=(architecture,) * experts)
