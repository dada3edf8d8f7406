"""A trained run on text, opened from its folder alone: one whole language model, and how text becomes its tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.common_expert import COMMON_EXPERT, load_common_expert
from fedjets_flwr.models.transformer import LanguageArchitecture, joined, sizes_of, vector_names, whole
from fedjets_flwr.names import DENSE
from fedjets_flwr.runs.records import Count, SummaryTold
from fedjets_flwr.runs.trained_run import SUMMARY, told, vectors_in, written_settings


class LanguageTold(SummaryTold):
    """What a summary must tell of a model that is to be used."""

    rounds: Count
    weights_hash: str


@dataclass(frozen=True)
class LanguageRun:
    """A run's settings, results and model.

    Attributes:
        config: its settings; folders in it are those of the machine that ran it.
        summary: ``summary.json``.
        architecture: of the whole model.
        vector: the whole model of the newest checkpoint, as clients receive it.
        tokeniser: how text becomes tokens (``Tokens.told``).
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    architecture: LanguageArchitecture
    vector: Tensor
    tokeniser: str


def open_language_run(folder: StrPath) -> LanguageRun:
    """Return the trained run on text in a folder.

    Raises:
        FedjetsError: it is no folder of such a run, the run is not finished, or its files are damaged.
    """
    folder = Path(folder)
    config = written_settings(folder)
    if not config.of_text:
        raise FedjetsError(f"{folder}: data.name = {config.data.name!r}: a run on images; give --images instead")
    if config.of_tasks:
        raise FedjetsError(
            f"{folder}: data.name = {config.data.name!r}: a run on tasks; a text gets experts of one on text"
        )
    summary = told(folder, SUMMARY, LanguageTold)
    if not (folder / COMMON_EXPERT).is_file():
        raise FedjetsError(f"{folder}: no models in it; those of a deployed run are in its folder on the server")
    common = load_common_expert(folder / COMMON_EXPERT)
    if not isinstance(common.architecture, LanguageArchitecture):
        raise FedjetsError(f"{folder / COMMON_EXPERT}: damaged: it reads images")
    if not common.encodes:
        raise FedjetsError(f"{folder / COMMON_EXPERT}: tells no tokeniser; do the run again with this release")
    vector = _whole(vectors_in(folder / "checkpoints"), common.architecture, folder, config)
    vector = vector.to(getattr(torch, config.transport.dtype)).float()
    return LanguageRun(folder, config, summary, common.architecture, vector, common.tokeniser)


def _whole(vectors: dict[str, Tensor], architecture: LanguageArchitecture, folder: Path, config: Config) -> Tensor:
    """Return the vector of the whole model, which a method keeps in parts, or as its only expert."""
    sets, sizes = whole(architecture), sizes_of(architecture)
    names = vector_names(sets)
    if DENSE in vectors and vectors.keys() >= set(names):
        expected = [sizes.dense, *[sizes.expert] * (len(names) - 1)]
        if [vectors[name].numel() for name in names] == expected:
            return joined(vectors, sets)
    elif "expert.0" in vectors and vectors["expert.0"].numel() == sizes.of(len(names) - 1):
        return vectors["expert.0"]
    if not vectors:
        raise FedjetsError(
            f"{folder}: strategy.name = {config.strategy.name!r} keeps no model at the server; every client has its own"
        )
    raise FedjetsError(f"{folder}: damaged: its newest checkpoint does not hold the model that {COMMON_EXPERT} tells")
