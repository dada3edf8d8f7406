"""The common expert: a frozen, pretrained classifier whose features the gate reads.

Stored as safetensors; the metadata says what it is, so that a file is enough to use it.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedjets_flwr.data.text_tokens import as_bytes, check_told
from fedjets_flwr.data.transforms import normalise
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import AnyArchitecture, Architecture, build
from fedjets_flwr.models.transformer import LanguageArchitecture
from fedjets_flwr.printable import reason

log = logging.getLogger("flwr")

COMMON_EXPERT = "common-expert.safetensors"
"""Its file in the folder of a run, and in a bundle."""


def told_fields(kind: type[AnyArchitecture]) -> list[Field[Any]]:
    """Return what a file tells of an architecture."""
    return [field for field in fields(kind) if field.repr]


@dataclass(frozen=True, eq=False)
class CommonExpert:
    """A frozen model in eval mode and the preprocessing it was trained with.

    Attributes:
        accuracy: on the samples that stopped its training.
        temperature: by which its logits are as sure as it is right on held-out public samples; 1: nobody measured it.
        usual_entropy: how sure it is of those samples (``calibration.usual_entropy``); NaN: nobody measured it.
        tokeniser: of a language model, how text becomes the numbers that it reads (``text_tokens.tokens_of``); empty:
            bytes, or a file that lacks it.
    """

    model: nn.Sequential
    architecture: AnyArchitecture
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dataset: str
    accuracy: float
    temperature: float = 1.0
    usual_entropy: float = math.nan
    tokeniser: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over weights and preprocessing."""
        hasher = hashlib.sha256(repr((self.architecture, self.mean, self.std)).encode() + self.tokeniser.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            hasher.update(name.encode())
            hasher.update(tensor.cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels as this model's float32 input."""
        return normalise(pixels, self.mean, self.std)

    @cached_property
    def as_bytes(self) -> bytes:
        """The safetensors file."""
        kept = told_fields(type(self.architecture))
        metadata = {f.name: str(getattr(self.architecture, f.name)) for f in kept}
        metadata |= {"mean": _join(self.mean), "std": _join(self.std)}
        metadata |= {"dataset": self.dataset, "test_accuracy": f"{self.accuracy:.6f}"}
        if self.temperature != 1:
            metadata["temperature"] = repr(self.temperature)
        if not math.isnan(self.usual_entropy):
            metadata["usual_entropy"] = repr(self.usual_entropy)
        if self.tokeniser:
            metadata["tokeniser"] = self.tokeniser
        return safetensors.torch.save(self.model.state_dict(), metadata)

    @property
    def encodes(self) -> bool:
        """Whether it tells how text becomes what it reads: bytes are all the tokens of a vocabulary of 256."""
        return bool(self.tokeniser) or self.architecture.num_classes == len(as_bytes().pieces)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model."""
        return sum(p.numel() for p in self.model.parameters())


def freeze(model: nn.Sequential) -> nn.Sequential:
    """Return the model in eval mode with gradients off."""
    return model.eval().requires_grad_(False)


def load_common_expert(path: StrPath) -> CommonExpert:
    """Return the common expert in a file; it is read once per process, and again if it changed.

    Files of ``pytorch_resnet_cifar10`` (metadata key ``arch``, percentages) are understood too.

    Raises:
        FedjetsError: no such file, not safetensors, or not a common expert.
    """
    path = Path(path)
    if not path.is_file():
        raise FedjetsError(f"common-expert.path = {str(path)!r}: no such file; leave it empty to train one")
    facts = path.stat()
    return _load(path, facts.st_size, facts.st_mtime_ns)


def kept_common_expert(path: Path) -> CommonExpert | None:
    """Return the common expert in a file of a cache, or None; the log tells of one that cannot be read."""
    try:
        return load_common_expert(path) if path.is_file() else None
    except FedjetsError as error:
        log.warning("%s; it is made or fetched anew", error)
        return None


@lru_cache(maxsize=2)
def _load(path: Path, size: int, written: int) -> CommonExpert:
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
        return common_expert_of(metadata, tensors)
    except (SafetensorError, LookupError, ValueError, ArithmeticError, TypeError, RuntimeError, OSError) as error:
        raise FedjetsError(
            f"common-expert.path = {str(path)!r}: not a common expert ({reason(error)});"
            " make one with `fedjets pretrain`"
        ) from None


def common_expert_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> CommonExpert:
    """Return the common expert of a safetensors file's metadata and tensors.

    Raises:
        LookupError, ValueError, ArithmeticError, TypeError, RuntimeError: they do not describe one, or do not fit each
            other.
    """
    architecture, tensors = _architecture(metadata, tensors), _stage_names(tensors)
    with torch.device("meta"):  # no memory for a size that the file only claims
        expected = _shapes(build(architecture, 0).state_dict())
    if differing := set(expected.items()) ^ set(_shapes(tensors).items()):
        raise KeyError(min(name for name, _ in differing))
    if not all(t.is_floating_point() for name, t in tensors.items() if not name.endswith("num_batches_tracked")):
        raise ValueError("weights that are no floats")
    model = build(architecture, 0)
    model.load_state_dict(tensors, strict=False)
    mean, std = (tuple(map(float, filter(None, metadata[key].split(",")))) for key in ("mean", "std"))
    if not len(mean) == len(std) == architecture.channels or not all(
        map(math.isfinite, [*mean, *(1 / s for s in std)])
    ):
        raise ValueError("mean and std need one number per channel")
    accuracy = float(metadata["test_accuracy"])
    accuracy = accuracy / 100 if accuracy > 1 else accuracy
    temperature = float(metadata.get("temperature", 1.0))
    if not 0.01 <= temperature <= 100:
        raise ValueError("temperature: none from 0.01 to 100")
    usual = float(metadata.get("usual_entropy", math.nan))
    if not (math.isnan(usual) or 0 <= usual < math.inf):
        raise ValueError("usual_entropy: no entropy")
    tokeniser = metadata.get("tokeniser", "") if isinstance(architecture, LanguageArchitecture) else ""
    check_told(tokeniser, architecture.num_classes)
    dataset = metadata["dataset"]
    return CommonExpert(freeze(model), architecture, mean, std, dataset, accuracy, temperature, usual, tokeniser)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


def _architecture(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> AnyArchitecture:
    if "vocabulary" in metadata:
        kept = told_fields(LanguageArchitecture)
        return LanguageArchitecture(**{f.name: int(metadata[f.name]) for f in kept})  # type: ignore[arg-type]
    if "arch" in metadata:
        name, classes = metadata["arch"], tensors["linear.weight"].shape[0]
        return Architecture(name, tensors["conv1.weight"].shape[0], "batch", "cifar", 3, classes)
    told = {f.name: (int if f.type is int else str)(metadata[f.name]) for f in told_fields(Architecture)}
    return Architecture(**told)  # type: ignore[arg-type]


def _stage_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefixes = {"conv1.": "stem.conv1.", "bn1.": "stem.bn1.", "linear.": "head."}

    def rename(name: str) -> str:
        for old, new in prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def _join(values: tuple[float, ...]) -> str:
    return ",".join(repr(float(value)) for value in values)


@torch.inference_mode()
def logits_of(expert: CommonExpert, pixels: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the logits (n, C) of uint8 pixels (n, c, h, w)."""
    return torch.cat([expert.model(expert.normalise(part)) for part in pixels.split(batch_size)])


def accuracy_of(expert: CommonExpert, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of right answers on uint8 pixels."""
    return int((logits_of(expert, pixels).argmax(1) == labels).sum()) / len(labels)
