"""What is kept on a disk, so as to be made once: tensors with a digest. A damaged file is known and made anew."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedjets_flwr.files import written

log = logging.getLogger("flwr")
DIGEST = "sha256"


def keep(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors with their digest, in one step."""
    with written(path) as file:
        safetensors.torch.save_file(dict(tensors), file, {DIGEST: digest_of(tensors)})


def kept(path: Path) -> dict[str, Tensor] | None:
    """Return memory-mapped tensors, or None where there are none; a damaged file is deleted, which the log says."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get(DIGEST)
        tensors = safetensors.torch.load_file(path)
        if digest_of(tensors) == wanted:
            return tensors
    except (SafetensorError, OSError):
        pass
    log.warning("%s is damaged: it is made anew", path)
    path.unlink(missing_ok=True)
    return None


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, kinds, shapes and bytes of tensors on the CPU."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        hasher.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()
