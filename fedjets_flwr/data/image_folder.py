"""A site's own images: torchvision's ImageFolder layout, or a flat folder without labels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedjets_flwr.data.datasets import UNKNOWN, Images
from fedjets_flwr.data.site_cache import site_file
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.kept import keep, kept
from fedjets_flwr.printable import reason

log = logging.getLogger("flwr")

# Those of torchvision, whose import takes longer than torch's.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What a file may be, whatever its name says: Pillow alone would start Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
MAX_BYTES = 200_000_000
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Folder:
    """Images (labels are :data:`UNKNOWN` in a flat folder) and the file of each."""

    images: Images
    paths: tuple[Path, ...]


def cached_images(folder: Path, classes: Sequence[str], shape: tuple[int, int, int], cache: Path) -> Images:
    """Return the images of :func:`read_folder`, kept decoded in ``cache`` for processes to come.

    A deployed client starts a process for every message; a folder of which a file changed is read anew.
    """
    if not folder.is_dir():
        raise FedjetsError(f"{folder}: no such folder of images")
    files = [(path, path.stat(follow_symlinks=path.exists())) for path in sorted(folder.rglob("*"))]
    path = site_file(cache, folder, files, (1, classes, shape))
    if (tensors := kept(path)) is not None:
        return Images(tensors["pixels"], tensors["labels"])
    found = read_folder(folder, classes, shape).images
    keep({"pixels": found.pixels, "labels": found.labels}, path)
    return found


def read_folder(folder: Path, classes: Sequence[str], shape: tuple[int, int, int]) -> Folder:
    """Return the images of a folder in the order of their paths; a broken file costs itself, and the log counts them.

    Args:
        folder: holds class folders, or images alone.
        classes: names of the classes, in the order of the model's outputs (a tuple); a folder may lack some.
        shape: channels (1 or 3), height and width that the model takes; images are converted and resized.

    Raises:
        FedjetsError: names the folder or file that is missing or unknown, or the first file if none can be read.
    """
    paths, labels = list_images(folder, classes)
    read: list[np.ndarray] = []
    kept_paths: list[Path] = []
    kept_labels: list[int] = []
    errors: list[FedjetsError] = []
    for path, label in zip(paths, labels, strict=True):
        try:
            read.append(read_image(path, shape))
        except FedjetsError as error:
            errors.append(error)
            continue
        kept_paths.append(path)
        kept_labels.append(label)
    if errors:
        if not read:
            raise errors[0]
        log.warning("%d of %d images are left out, the first is %s", len(errors), len(paths), errors[0])
    return Folder(Images(torch.from_numpy(np.stack(read)), torch.tensor(kept_labels)), tuple(kept_paths))


def read_domains(
    folder: Path, domains: Sequence[str], classes: Sequence[str], shape: tuple[int, int, int]
) -> tuple[Images, Images]:
    """Return train and test images of ``folder/domain/class/``, every fifth of a domain and class being a test image.

    That is how PACS, Office-Home and DomainNet lie on a disk: with no split of their own, or one that is not used.

    Raises:
        FedjetsError: as :func:`read_folder`; a domain has no folder, or no image of a known class.
    """
    parts = [read_folder(folder / name, classes, shape).images for name in domains]
    for name, part in zip(domains, parts, strict=True):
        if not part.labelled:
            raise FedjetsError(f"{folder / name}: a domain's images lie in one folder for each class, named as it")
    pixels, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels"))
    kinds = torch.cat([torch.full_like(part.labels, position) for position, part in enumerate(parts)])
    test = torch.zeros(len(labels), dtype=torch.bool)
    for cell in (kinds * len(classes) + labels).unique():
        test[(kinds * len(classes) + labels == cell).nonzero().flatten()[4::5]] = True
    train, held_out = (Images(pixels[rows], labels[rows], kinds[rows]) for rows in (~test, test))
    return train, held_out


def list_images(folder: Path, classes: Sequence[str]) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """Return the files of a folder's images in the order of their paths, and the label of each (:func:`read_folder`).

    Raises:
        FedjetsError: there is none, or names the folder or file that is missing or unknown.
    """
    if not folder.is_dir():
        raise FedjetsError(f"{folder}: no such folder of images")
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        found = [path for path in inside if path.is_dir()]
        if unknown := [path for path in found if path.name not in classes]:
            raise FedjetsError(
                f"{unknown[0]}: no such class; there are {', '.join(classes)}: name folders as the classes, or put all"
                " images into one flat folder"
            )
        loose = [path for path in inside if _is_image(path, folder)]
        if found and loose:
            raise FedjetsError(f"{loose[0]}: lies beside class folders; move it into one of them")
        labelled = [(path, classes.index(c.name)) for c in found for path in sorted(c.rglob("*")) if _is_image(path, c)]
        files = labelled if found else [(path, UNKNOWN) for path in loose]
    except OSError as error:
        raise FedjetsError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not files:
        raise FedjetsError(f"{folder}: no image in it (files that end in {', '.join(IMG_EXTENSIONS)})")
    return tuple(path for path, _ in files), tuple(label for _, label in files)


def read_images(paths: Sequence[Path], shape: tuple[int, int, int]) -> Tensor:
    """Return images as uint8 (n, channels, height, width) (see :func:`read_image`)."""
    return torch.from_numpy(np.stack([read_image(path, shape) for path in paths]))


def read_image(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return an image as uint8 (channels, height, width): upright, in grey or RGB, stretched to ``shape``.

    Raises:
        FedjetsError: it is no image, damaged, or too large to be one.
    """
    channels, height, width = shape
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} are more than {MAX_PIXELS} pixels")
            upright = _eight_bits(ImageOps.exif_transpose(image), path).convert("L" if channels == 1 else "RGB")
            if upright.size != (width, height):
                upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # decoders of damaged files raise what they like
        raise FedjetsError(f"{path}: not a readable image ({reason(error)})") from None
    pixels = np.asarray(upright, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_picture(pixels: Tensor) -> Image.Image:
    """Return uint8 pixels (channels, height, width) as a picture: what :func:`read_image` reads back."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Return a 16-bit grey image by its upper 8 bits; Pillow would make everything above 255 white.

    Raises:
        ValueError: its pixels are floating-point numbers, of which nobody knows what is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; save them as integers of 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).clip(0, 65535)
    if values.max() < 4096:
        _warn_of_dark(path.parent)
    return Image.fromarray((values >> 8).astype(np.uint8))


@cache
def _warn_of_dark(folder: Path) -> None:
    """Say once of a folder that what its cameras count with 12 bits is read as nearly black."""
    log.warning(
        "%s: images of 16 bits that use 12 of them or fewer are read as nearly black; scale their values to 16 bits",
        folder,
    )


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in IMG_EXTENSIONS and not hidden and path.is_file()
