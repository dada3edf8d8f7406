"""Normalisation and augmentation of whole batches, drawn per image."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 pixels (n, c, h, w) as float32: (x / 255 - mean) / std, per channel.

    On a CPU the channels lie innermost in memory (``channels_last``): convolutions and pooling there run faster.
    """
    # Made anew for every batch: tensors kept for the process would stay fake ones once a graph was traced with them.
    means, stds = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (mean, std))
    layout = torch.channels_last if pixels.device.type == "cpu" else torch.contiguous_format
    return pixels.to(torch.float32, memory_format=layout).mul_(1 / (255 * stds)).sub_(means / stds)


def keep(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the pixels as they are."""
    return pixels


def crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by its own random offset of up to an eighth of its size, zero-padded (4 pixels at 32x32)."""
    n, _, height, width = pixels.shape
    pad = max(1, height // 8)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator, device=pixels.device)
    rows = (top[:, None] + torch.arange(height, device=pixels.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=pixels.device))[:, None, None, :]
    images = torch.arange(n, device=pixels.device)[:, None, None, None]
    channels = torch.arange(pixels.shape[1], device=pixels.device)[None, :, None, None]
    return padded[images, channels, rows, columns]


def crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """:func:`crop`, then mirror every image with probability one half."""
    shifted = crop(pixels, generator)
    mirror = torch.rand(len(pixels), generator=generator, device=pixels.device) < 0.5
    return torch.where(mirror[:, None, None, None], shifted.flip(3), shifted)


AUGMENTATIONS: dict[str, Augment] = {"none": keep, "crop": crop, "crop-flip": crop_flip}
