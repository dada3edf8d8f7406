"""Embed once: what the frozen common expert says of a client's samples, kept on disk by content.

The key hashes the common expert's weights, the layers read, the preprocessing and the client's ordered samples, so an
entry can never be stale. Files are written to a temporary name and renamed, and read through a memory map.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedjets_flwr.models.architectures import tail_start
from fedjets_flwr.models.common_expert import CommonExpert


@dataclass(frozen=True)
class Embedded:
    """Frozen facts of n samples: the common expert's logits (n, C), the gate's input (n, d), and, for experts that are
    tails, the trunk's output (n, ...). All float32."""

    logits: Tensor
    embedding: Tensor
    features: Tensor | None


def embed(
    common: CommonExpert, pixels: Tensor, layer: str, trainable: str, folder: Path, device: torch.device
) -> tuple[Embedded, bool]:
    """Return what the common expert says of uint8 ``pixels``, and whether it had to be computed.

    Args:
        common: the frozen common expert.
        pixels: (n, c, h, w) uint8, in the client's order.
        layer: ``penultimate`` or ``logits``: the gate's input.
        trainable: ``moe.trainable``; decides where the trunk ends.
        folder: the cache.
        device: where to compute.
    """
    path = folder / "embeddings" / f"{_key(common, pixels, trainable)}.safetensors"
    entry, computed = _read(path), False
    if entry is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        safetensors.torch.save_file(compute(common, pixels, trainable, device), temporary)
        temporary.replace(path)
        entry, computed = _read(path), True
        assert entry is not None
    return embedded(entry, layer, trainable), computed


def embedded(entry: Mapping[str, Tensor], layer: str, trainable: str) -> Embedded:
    """Return what the gate and the experts read of :func:`compute`'s outputs."""
    embedding = entry["logits"] if layer == "logits" else entry["penultimate"]
    features = {"all": None, "head": entry["penultimate"], "stage": entry.get("trunk")}[trainable]
    return Embedded(entry["logits"], embedding, features)


def _key(common: CommonExpert, pixels: Tensor, trainable: str) -> str:
    kept = "trunk" if trainable == "stage" else "penultimate"
    hasher = hashlib.sha256(f"2:{common.digest}:{kept}:{tuple(pixels.shape)}".encode())
    hasher.update(pixels.contiguous().numpy().tobytes())
    return hasher.hexdigest()


@lru_cache(maxsize=1024)
def _open(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return a memory-mapped entry, or None where there is none or it is damaged (it is then made anew)."""
    try:
        entry = _open(path) if path.is_file() else None
    except (SafetensorError, OSError):
        return None
    return entry if entry is None or {"logits", "penultimate"} <= entry.keys() else None


@torch.inference_mode()
def compute(
    common: CommonExpert, pixels: Tensor, trainable: str, device: torch.device, batch_size: int = 256
) -> dict[str, Tensor]:
    """Return the common expert's outputs, float32 on the CPU: ``logits`` (n, C), ``penultimate`` (n, d) and, where the
    trunk ends before that, ``trunk`` (n, ...)."""
    model = common.model.to(device)
    trunk, neck = cut(model, "stage" if trainable == "stage" else "head")
    parts: dict[str, list[Tensor]] = {"logits": [], "penultimate": [], "trunk": []}
    for batch in pixels.split(batch_size):
        trunk_output = trunk(common.normalise(batch.to(device)))
        penultimate = neck(trunk_output)
        parts["logits"].append(model[-1](penultimate).cpu())
        parts["penultimate"].append(penultimate.cpu())
        if trainable == "stage":
            parts["trunk"].append(trunk_output.cpu())
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items() if tensors}


def cut(model: nn.Sequential, trainable: str) -> Sequence[nn.Sequential]:
    """Return the frozen trunk and what lies between it and the penultimate features."""
    start = tail_start(model, trainable)
    return model[:start], model[start:-1]
