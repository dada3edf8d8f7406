"""Embed once: what the frozen common expert says of a client's samples, kept on disk by content.

The key hashes the common expert's weights, the layers read, the preprocessing and the client's ordered samples, so an
entry can never be stale. Files are written to a temporary name and renamed, and read through a memory map.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedjets_flwr.kept import keep, kept
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.moe.adabn import adapt_batch_norm
from fedjets_flwr.tasks.base import Inputs


@dataclass(frozen=True)
class Embedded:
    """Frozen facts of n samples: the common expert's logits (n, C), the gate's input (n, d), and, for experts that are
    tails, the trunk's output (n, ...). All float32."""

    logits: Tensor
    embedding: Tensor
    features: Tensor | None


def embed(backbone: Backbone, pixels: Tensor, layer: str, folder: Path, device: torch.device) -> tuple[Embedded, bool]:
    """Return what the common expert says of uint8 ``pixels``, and whether it had to be computed.

    Args:
        backbone: the frozen common expert, cut where the experts begin.
        pixels: (n, c, h, w) uint8, in the client's order.
        layer: ``penultimate`` or ``logits``: the gate's input.
        folder: the cache.
        device: where to compute.
    """
    path = folder / "embeddings" / f"{_key(backbone, pixels, device)}.safetensors"
    entry, computed = _read(path), False
    if entry is None:
        keep(compute(backbone, pixels, device), path)
        entry, computed = _read(path), True
        assert entry is not None
    return embedded(entry, layer, backbone), computed


def embed_adapted(backbone: Backbone, pixels: Tensor, inputs: Inputs, folder: Path) -> Tensor:
    """Return :func:`adapted_logits` of the common expert and some samples, computed once.

    Args:
        backbone: with the common expert.
        pixels: (n, c, h, w) uint8.
        inputs: their normalised batches, on the device where to compute.
        folder: the cache.
    """
    path = folder / "embeddings" / f"{_key(backbone, pixels, inputs(torch.arange(1)).device)}-adabn.safetensors"
    entry = _read(path)
    if entry is None:
        keep({"logits": adapted_logits(backbone.common.model, inputs, len(pixels))}, path)
        entry = _read(path)
        assert entry is not None
    return entry["logits"]


def adapted_logits(model: nn.Module, inputs: Inputs, count: int) -> Tensor:
    """Return the logits (count, C), on the CPU, of a model with the batch-norm statistics of these samples (AdaBN).

    Args:
        model: in eval mode, is left as it is.
        inputs: the samples' batches, on the device where to compute.
        count: how many there are.
    """
    own = copy.deepcopy(model).to(inputs(torch.arange(1)).device)
    adapt_batch_norm(own, inputs, count)
    with torch.inference_mode():
        parts = [own(inputs(rows)).cpu() for rows in torch.arange(count).split(256)]
    return torch.cat(parts).contiguous()


def embedded(entry: Mapping[str, Tensor], layer: str, backbone: Backbone) -> Embedded:
    """Return what the gate and the experts read of :func:`compute`'s outputs."""
    features = entry.get(backbone.cached) if backbone.cached else None
    return Embedded(entry["logits"], entry[layer], features)


def _key(backbone: Backbone, pixels: Tensor, device: torch.device) -> str:
    kept = "trunk" if backbone.keeps_trunk else "penultimate"
    where = "" if device.type == "cpu" else f":{device.type}"  # which rounds otherwise
    hasher = hashlib.sha256(f"3:{backbone.common.digest}:{kept}:{tuple(pixels.shape)}{where}".encode())
    hasher.update(pixels.contiguous().numpy().tobytes())
    return hasher.hexdigest()


@lru_cache(maxsize=1024)
def _open(path: Path) -> dict[str, Tensor]:
    """Return an entry that is there; an exception is not remembered."""
    if (entry := kept(path)) is None:
        raise FileNotFoundError(path)
    return entry


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return a memory-mapped entry, checked once per process, or None where there is none that is whole."""
    try:
        return _open(path)
    except FileNotFoundError:
        return None


@torch.inference_mode()
def compute(backbone: Backbone, pixels: Tensor, device: torch.device, batch_size: int = 256) -> dict[str, Tensor]:
    """Return the common expert's outputs, float32 on the CPU: ``logits`` (n, C), ``penultimate`` (n, d) and, where the
    trunk ends before that, ``trunk`` (n, ...)."""
    backbone.common.model.to(device)
    kept = ("logits", "penultimate", *(("trunk",) if backbone.keeps_trunk else ()))
    parts: dict[str, list[Tensor]] = {name: [] for name in kept}
    for batch in pixels.split(batch_size):
        seen = backbone.see(backbone.common.normalise(batch.to(device)))
        for name, tensors in parts.items():
            tensors.append(seen[name].cpu())
    return {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
