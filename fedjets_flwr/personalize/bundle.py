"""A personalised model as a folder: weights as safetensors, ``card.json`` that says what they are, and predictions.

A bundle may come from anybody. The card is checked against a schema, no file name is taken from it, every byte is
compared with its digest, and sizes that a file only claims cost no memory. The digests tell damage, not forgery:
whoever can write the folder can write a card that fits.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from fedjets_flwr.config.sections import Model, Specialist
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.common_expert import COMMON_EXPERT, CommonExpert, common_expert_of
from fedjets_flwr.models.expert import gate_inputs
from fedjets_flwr.models.gate import build_gate
from fedjets_flwr.moe.specialist import build_mixture
from fedjets_flwr.printable import reason
from fedjets_flwr.reading import JSON, parse

CARD = "card.json"
LANGUAGE = "fedjets-language-bundle"
"""The format of a bundle for a text (``language_bundle``)."""
COMMON = COMMON_EXPERT
GATE = "gate.safetensors"
PREDICTIONS = "predictions.csv"
CARD_BYTES = 10_000_000
FILE_BYTES = 1_000_000_000
HEADER_BYTES = 1_000_000

AnyCard = TypeVar("AnyCard", bound=BaseModel)
Module = TypeVar("Module", bound=nn.Module)
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=4, le=1024)]  # as data.size


class MixtureCard(BaseModel):
    """How the one expert of a bundle mixes a specialist of the site's own with the run's model (``specialist.*``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gate: Literal["network", "head"]
    mix: Literal["probs", "log-probs"]


class Card(BaseModel):
    """What a bundle says of itself.

    Attributes:
        about: the same in a few sentences.
        run: name of the run; ``weights_hash`` is that of its ``summary.json``.
        image_shape: channels, height, width.
        experts: ids of the K experts, in the order in which the read-out sees them.
        gated: whether a gate weighs the experts for each image; without one ``gate_scores`` do for all.
        gate_scores: mean score of each of the run's M experts on the site's images; without a gate 1 for the surest.
        read_out: how the K experts answer (a key of ``gating.READ_OUTS``); ``common``: the common expert does, to
            which such images are more familiar.
        prior: how ``label_prior`` was estimated, by which probabilities are corrected; ``none``: they are not.
        label_prior: class shares of the site's images, estimated, or counted where labels made a mixture.
        images: how many images that were.
        trainable: what an expert is (``moe.trainable``).
        embedding: what the gate reads (``common-expert.embedding``).
        model: architecture of the experts, of the first one where they differ.
        models: of each of the K experts where they differ; else empty.
        mixture: set if the one expert is a mixture of two models of that architecture.
        neck: what experts have between features and head (a key of ``architectures.NECKS``).
        sha256: digest of every other file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal["fedjets-bundle"] = "fedjets-bundle"
    format_version: Literal[1] = 1
    about: str
    strategy: str
    dataset: str
    run: str
    rounds: Count
    seed: Count
    weights_hash: str
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    image_shape: tuple[Literal[1, 3], Side, Side]
    experts: Annotated[tuple[Count, ...], Field(min_length=1)]
    gated: bool
    gate_scores: tuple[Share, ...]
    read_out: Literal["top-1", "mixture", "blend", "mean", "common"]
    prior: Literal["none", "em", "support", "map"]
    label_prior: tuple[Share, ...]
    images: Count
    trainable: Literal["all", "stage", "head"]
    embedding: Literal["penultimate", "logits"]
    model: Model
    models: tuple[Model, ...] = ()
    mixture: MixtureCard | None = None
    neck: Literal["", "gaussian"] = ""
    versions: dict[str, str]
    sha256: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.experts)) < len(self.experts) or max(self.experts) >= len(self.gate_scores):
            raise ValueError("experts: not different ids of the run's experts")
        if len(self.label_prior) != len(self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes, label_prior: not one share for each of the different classes")
        if len(self.models) not in (0, len(self.experts)) or (self.models and self.trainable != "all"):
            raise ValueError("models: not one for each of the experts, or of experts that share a trunk")
        if self.mixture and (len(self.experts) > 1 or self.gated):
            raise ValueError("mixture: of one expert without a gate over others")
        return self

    def architecture(self, expert: int) -> Architecture:
        """Return the architecture of an expert, or of the model whose tail it is."""
        m = self.models[self.experts.index(expert)] if self.models else self.model
        return Architecture(m.name, m.width, m.norm, m.stem, self.image_shape[0], len(self.classes), self.neck)

    def module(self, expert: int) -> nn.Module:
        """Return an expert as it is built, without its weights."""
        if self.mixture is None:
            return tail(build(self.architecture(expert), 0), self.trainable)
        how = Specialist(gate=self.mixture.gate, mix=self.mixture.mix)
        return build_mixture(self.architecture(expert), self.trainable, how, 0)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the files that hold the model."""
        return (COMMON, *((GATE,) if self.gated else ()), *map(expert_file, self.experts))


def expert_file(expert: int) -> str:
    """Return the name of an expert's file."""
    return f"expert-{expert}.safetensors"


def check_free(folder: StrPath) -> None:
    """Raise FedjetsError if a bundle cannot be written there without a loss."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedjetsError(f"{folder}: there is something already; remove it, or name another --output")
    if not folder.name:
        raise FedjetsError(f"{folder}: a bundle is a folder of its own; name another --output")


def write_bundle(folder: StrPath, card: BaseModel, files: Mapping[str, bytes]) -> None:
    """Write a bundle in one step; its card tells the digests of ``files`` (``sha256``).

    Raises:
        FedjetsError: the folder holds something already, or cannot be written.
    """
    card = card.model_copy(update={"sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}})
    write_folder(folder, {**files, CARD: f"{card.model_dump_json(indent=2)}\n".encode()})


def write_folder(folder: StrPath, files: Mapping[str, bytes]) -> None:
    """Write a new folder in one step, files by their paths in it.

    Raises:
        FedjetsError: the folder holds something already, or cannot be written.
    """
    folder = Path(folder)
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)
        temporary.rename(folder)
    except OSError as error:
        raise FedjetsError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_bundle(folder: StrPath) -> tuple[Card, dict[str, bytes]]:
    """Return a bundle's card and its files by name, their digests checked.

    Raises:
        FedjetsError: names the file that is missing, altered, or no part of a bundle.
    """
    folder = Path(folder)
    if format_of(folder) == LANGUAGE:
        raise FedjetsError(
            f"{folder}: a language model for a text, not a model of images; only `fedjets predict` has it"
        )
    card = read_card(folder / CARD, Card)
    if set(card.sha256) - {PREDICTIONS} != set(card.weights):
        wanted = ", ".join(card.weights)
        raise FedjetsError(f"{folder / CARD}: damaged, or of another version (sha256: not the files {wanted})")
    return card, read_files(folder, card.sha256, lambda name: _most_bytes(card, name))


def read_files(folder: Path, digests: Mapping[str, str], most: Callable[[str], int]) -> dict[str, bytes]:
    """Return the files of a bundle by name.

    Args:
        folder: the bundle.
        digests: of the files that there must be.
        most: name -> bytes that a file may have.

    Raises:
        FedjetsError: names the file that is missing, too large, or altered.
    """
    files = {name: _read(folder / name, most(name)) for name in digests}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != digests[name]:
            raise FedjetsError(f"{folder / name}: altered or damaged, its digest is not that of {CARD}; make it anew")
    return files


def _most_bytes(card: Card, name: str) -> int:
    """Return how large a file of a bundle may be: an expert's is its architecture's, of which no byte is read."""
    experts = {expert_file(expert): expert for expert in card.experts}
    if name not in experts:
        return FILE_BYTES
    try:
        with torch.device("meta"):
            state = card.module(experts[name]).state_dict()
    except (ValueError, ArithmeticError, TypeError, RuntimeError):  # no such model: told when it is built
        return FILE_BYTES
    weights: int = sum(tensor.nbytes for tensor in state.values())
    return min(weights + HEADER_BYTES, FILE_BYTES)


def _read(path: Path, most: int) -> bytes:
    """Return the bytes of a file that holds no more than ``most``; a larger one is not opened."""
    try:
        if path.is_file():
            if (size := path.stat().st_size) > most:
                raise FedjetsError(f"{path}: {size} bytes, more than the {most} that it may have; make it anew")
            return path.read_bytes()
    except OSError as error:
        raise FedjetsError(f"{path}: cannot be read ({error.strerror})") from None
    raise FedjetsError(f"{path}: missing; a bundle is a folder that `fedjets personalize` wrote, complete")


def format_of(folder: StrPath) -> str:
    """Return which format the card of a bundle names; empty: none that can be read."""
    path = Path(folder) / CARD
    try:
        found = parse(_read(path, CARD_BYTES).decode(errors="replace"), JSON, str(path))
    except FedjetsError:
        return ""
    return str(found.get("format", "")) if isinstance(found, dict) else ""


def read_card(path: Path, kind: type[AnyCard]) -> AnyCard:
    """Return the card of a bundle.

    Raises:
        FedjetsError: it is missing, or not of its kind.
    """
    data = _read(path, CARD_BYTES)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FedjetsError(
            f"{path}: damaged, or of another version ({f'{where}: ' * bool(where)}{first['msg']})"
        ) from None
    except ValueError as error:
        raise FedjetsError(f"{path}: damaged, or of another version ({error})") from None


def read_common(card: Card, data: bytes, path: Path) -> CommonExpert:
    """Return the common expert of a bundle.

    Raises:
        FedjetsError: the file is none, or does not fit the card.
    """
    try:
        tensors = _tensors(data)
        common = common_expert_of(_metadata(data), tensors)
    except (SafetensorError, LookupError, ValueError, ArithmeticError, TypeError, RuntimeError) as error:
        raise FedjetsError(f"{path}: not a common expert ({reason(error)})") from None
    found, wanted = common.architecture, replace(card.architecture(card.experts[0]), neck="")
    fits = found == wanted
    if card.trainable == "all":  # a whole expert is of any architecture
        fits = (found.channels, found.num_classes) == (wanted.channels, wanted.num_classes)
    if not fits:
        raise FedjetsError(f"{path}: a common expert of other classes, images or architecture than {CARD} says")
    return common


def read_expert(card: Card, expert: int, data: bytes, path: Path) -> nn.Module:
    """Return an expert of a bundle, in eval mode."""
    return filled(lambda: card.module(expert), data, path)


def read_gate(card: Card, common: CommonExpert, data: bytes, path: Path) -> nn.Module:
    """Return the gate of a bundle over all M experts, in eval mode."""

    def make() -> nn.Sequential:
        hidden = safetensors.torch.load(data)["hidden.bias"].numel()
        return build_gate(gate_inputs(common, card.embedding), hidden, len(card.gate_scores), 0)

    return filled(make, data, path)


def filled(make: Callable[[], Module], data: bytes, path: Path) -> Module:
    """Return the module of ``make`` in eval mode, with the tensors of a file, which must be exactly its own.

    Raises:
        FedjetsError: they are not.
    """
    try:
        tensors = _tensors(data)
        with torch.device("meta"):
            module = make()
        expected, found = ({n: (t.shape, t.dtype) for n, t in held.items()} for held in (module.state_dict(), tensors))
        if differing := set(expected.items()) ^ set(found.items()):
            raise ValueError(f"{min(name for name, _ in differing)} does not fit {CARD}")
        module.load_state_dict(tensors, assign=True)
    except (SafetensorError, KeyError, ValueError, ArithmeticError, TypeError, RuntimeError) as error:
        raise FedjetsError(f"{path}: not the weights of this model ({reason(error)})") from None
    module.eval().requires_grad_(False)
    return module


def _tensors(data: bytes) -> dict[str, Tensor]:
    tensors = safetensors.torch.load(data)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError("weights that are not finite")
    return tensors


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__", {}))
