"""The images of a question: a folder, files, or pixels in memory; files are read a piece at a time."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedjets_flwr.data.datasets import UNKNOWN
from fedjets_flwr.data.image_folder import list_images, read_images
from fedjets_flwr.errors import FedjetsError


@dataclass(frozen=True)
class Pictures:
    """Images that are read when they are wanted.

    Attributes:
        count: n.
        read: (start, stop) -> uint8 (stop - start, c, h, w), fewer at the end.
        files: their files, relative to the folder if they came as one; empty for pixels.
        labels: (n,) int64 if class folders tell them all, else None.
    """

    count: int
    read: Callable[[int, int], Tensor]
    files: tuple[str, ...] = ()
    labels: Tensor | None = None


def open_pictures(images: object, classes: Sequence[str], shape: tuple[int, int, int]) -> Pictures:
    """Return the images of a folder (class folders or flat), of one file, of a sequence of files, or of pixels.

    Args:
        images: path, sequence of paths, or uint8 (n, c, h, w) as tensor or array.
        classes: names that class folders may have.
        shape: channels, height and width of the model's images; files are converted, pixels must have it.

    Raises:
        FedjetsError: there is no image, or they are of another kind.
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        return _of_files((path,), shape) if path.is_file() else _of_folder(path, classes, shape)
    if isinstance(images, Tensor | np.ndarray):
        return _of_pixels(torch.as_tensor(images), shape)
    if isinstance(images, Sequence) and images and all(isinstance(path, str | os.PathLike) for path in images):
        return _of_files(tuple(map(Path, images)), shape)
    raise FedjetsError("images: expected a folder, files, or uint8 pixels (n, channels, height, width); at least one")


def _of_folder(folder: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> Pictures:
    paths, labels = list_images(folder, classes)
    known = torch.tensor(labels) if UNKNOWN not in labels else None
    files = tuple(path.relative_to(folder).as_posix() for path in paths)
    return Pictures(len(paths), lambda start, stop: read_images(paths[start:stop], shape), files, known)


def _of_files(paths: tuple[Path, ...], shape: tuple[int, int, int]) -> Pictures:
    return Pictures(len(paths), lambda start, stop: read_images(paths[start:stop], shape), tuple(map(str, paths)))


def _of_pixels(pixels: Tensor, shape: tuple[int, int, int]) -> Pictures:
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != tuple(shape) or not len(pixels):
        wanted = ", ".join(map(str, shape))
        raise FedjetsError(
            f"images: {str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}, expected uint8 (n, {wanted});"
            " give a folder or files to have them converted"
        )
    return Pictures(len(pixels), lambda start, stop: pixels[start:stop])
