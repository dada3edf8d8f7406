"""A site's own images: torchvision's ImageFolder layout, or a flat folder without labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from fedjets_flwr.data.datasets import Images
from fedjets_flwr.errors import FedjetsError

UNKNOWN = -1
"""Label of an image whose class nobody told."""


@dataclass(frozen=True)
class Folder:
    """Images (labels are :data:`UNKNOWN` in a flat folder) and the file of each."""

    images: Images
    paths: tuple[Path, ...]

    @property
    def labelled(self) -> bool:
        """Whether class folders tell the labels."""
        return bool((self.images.labels != UNKNOWN).all())


@lru_cache(maxsize=8)
def read_folder(folder: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> Folder:
    """Return the images of a folder in the order of their paths; it is read once per process.

    Args:
        folder: holds class folders, or images alone.
        classes: names of the classes, in the order of the model's outputs (a tuple); a folder may lack some.
        shape: channels (1 or 3), height and width that the model takes; images are converted and resized.

    Raises:
        FedjetsError: names the folder or file that is missing, unknown or unreadable.
    """
    if not folder.is_dir():
        raise FedjetsError(f"{folder}: no such folder of images")
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        found = [path for path in inside if path.is_dir()]
        if unknown := [path for path in found if path.name not in classes]:
            raise FedjetsError(
                f"{unknown[0]}: no such class; data.classes names {', '.join(classes)}: mend one of the two"
            )
        loose = [path for path in inside if _is_image(path)]
        if found and loose:
            raise FedjetsError(f"{loose[0]}: lies beside class folders; move it into one of them")
        labelled = [(path, classes.index(c.name)) for c in found for path in sorted(c.rglob("*")) if _is_image(path)]
        files = labelled if found else [(path, UNKNOWN) for path in loose]
    except OSError as error:
        raise FedjetsError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not files:
        raise FedjetsError(f"{folder}: no image in it (files that end in {', '.join(IMG_EXTENSIONS)})")
    pixels = np.stack([read_image(path, shape) for path, _ in files])
    images = Images(torch.from_numpy(pixels), torch.tensor([label for _, label in files]))
    return Folder(images, tuple(path for path, _ in files))


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return an image as uint8 (channels, height, width): upright, in grey or RGB, stretched to ``shape``.

    Raises:
        FedjetsError: it is no image, damaged, or too large to be one.
    """
    channels, height, width = shape
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            if upright.size != (width, height):
                upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise FedjetsError(f"{path}: not a readable image ({str(error).splitlines()[0]})") from None
    pixels = np.asarray(upright, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and path.is_file()
