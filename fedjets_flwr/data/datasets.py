"""Data sets as uint8 tensors in memory.

Pickled CIFAR files are read only after their MD5 matched a known one.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedjets_flwr.errors import FedjetsError

UNKNOWN = -1
"""Label of an image whose class nobody told."""


@dataclass(frozen=True)
class Images:
    """Images (n, channels, height, width) uint8, labels (n,) int64, and domains (n,) int64 where images are of some."""

    pixels: Tensor
    labels: Tensor
    domains: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """Whether the labels are known."""
        return bool((self.labels != UNKNOWN).all())

    def subset(self, indices: np.ndarray) -> "Images":
        """Return the samples at ``indices``, in that order."""
        rows = torch.from_numpy(indices)
        return Images(self.pixels[rows], self.labels[rows], None if self.domains is None else self.domains[rows])


@dataclass(frozen=True)
class Spec:
    """What a model must know of its samples: their shape, (channels, height, width), and the names of the classes.

    ``kinds``: names of what clients differ in, and experts specialise in; empty: the classes.
    """

    shape: tuple[int, ...]
    classes: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names by which experts are told apart."""
        return self.kinds or self.classes


@dataclass(frozen=True)
class Dataset:
    """A train and a test split, and what a model must know of them."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    @property
    def spec(self) -> Spec:
        """Shape and classes."""
        return Spec(self.shape, self.classes)


CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.25,)


def no_images(shape: tuple[int, int, int]) -> Images:
    """Return a split without samples: the shape of images that lie elsewhere."""
    return Images(torch.empty(0, *shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


@lru_cache(maxsize=2)
def load_dataset(name: str, folder: Path, download: bool) -> Dataset:
    """Return a published data set; it is read once per process.

    Raises:
        FedjetsError: the files are missing, or are not the published ones, or hold no images.
    """
    if name not in LOADERS:
        raise FedjetsError(f"data.name = {name!r}: holds no images; set it to {' or '.join(LOADERS)} or image-folder")
    return LOADERS[name](folder, download)


def _digits_table() -> np.ndarray:
    """Return a row of 64 pixels, 0 to 16, and the label for each digit.

    By the file where it is known to lie: importing scikit-learn takes every process of a run a second.
    """
    spec = find_spec("sklearn")
    path = Path(str(spec and spec.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def _digits(folder: Path, download: bool) -> Dataset:
    """The 8x8 digits that scikit-learn ships: every fourth image is a test image."""
    table = _digits_table()
    pixels = torch.from_numpy((table[:, :-1] * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    test = torch.arange(len(labels)) % 4 == 3
    return Dataset(
        "digits",
        Images(pixels[~test], labels[~test]),
        Images(pixels[test], labels[test]),
        tuple(str(digit) for digit in range(10)),
        (0.3053,),
        (0.3760,),
    )


# The second set of each CIFAR-100 file holds the same images and labels; only the order within a class differs.
_MD5 = {
    "cifar-10-batches-py/data_batch_1": {"c99cafc152244af753f735de768cd75f"},
    "cifar-10-batches-py/data_batch_2": {"d4bba439e000b95fd0a9bffe97cbabec"},
    "cifar-10-batches-py/data_batch_3": {"54ebc095f3ab1f0389bbae665268c751"},
    "cifar-10-batches-py/data_batch_4": {"634d18415352ddfa80567beed471001a"},
    "cifar-10-batches-py/data_batch_5": {"482c414d41f54cd18b22e5b47cb7c3cb"},
    "cifar-10-batches-py/test_batch": {"40351d587109b95175f43aff81a1287e"},
    "cifar-10-batches-py/batches.meta": {"5ff9c542aee3614f3951f8cda6e48888"},
    "cifar-100-python/train": {"16019d7e3df5f24257cddd939b257f8d", "a19872f1eea00313db9d58a23dce524d"},
    "cifar-100-python/test": {"f0ef6b0ae62326f3e7ffdfab6717acfc", "66ab8d6d957b441f20d9b74bbd2073fd"},
    "cifar-100-python/meta": {"7973b15100ade9c7d40fb424638fde48"},
}


def _cifar10(folder: Path, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10

    _provide(CIFAR10, "cifar-10-batches-py", "cifar10", folder, download)
    return _from_torchvision("cifar10", CIFAR10(folder, train=True), CIFAR10(folder, train=False))


def _cifar100(folder: Path, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR100

    digests = _provide(CIFAR100, "cifar-100-python", "cifar100", folder, download)

    class Checked(CIFAR100):  # type: ignore[misc]
        """torchvision's loader, told which of the accepted files lie here."""

        train_list = [["train", digests["train"]]]
        test_list = [["test", digests["test"]]]

    return _from_torchvision("cifar100", Checked(folder, train=True), Checked(folder, train=False))


def _provide(loader: type, base: str, name: str, folder: Path, download: bool) -> dict[str, str]:
    """Download if wanted and needed; return the MD5 of every file, each one accepted."""
    files = [file for file in _MD5 if file.startswith(base + "/")]
    if download and not all((folder / file).is_file() for file in files):
        try:
            loader(folder, download=True)
        except (OSError, RuntimeError) as error:
            raise FedjetsError(
                f"data.dir = {str(folder)!r}: {name} is not there and its download failed ({error});"
                " put the official files there, or use data.name = 'digits', which needs no download"
            ) from None
    digests = {}
    for file in files:
        if not (folder / file).is_file():
            raise FedjetsError(
                f"data.dir = {str(folder)!r}: {file} is missing; set data.dir (or FEDJETS_DATA) to the folder"
                f" that holds {base}/, or data.download to true, or use data.name = 'digits', which needs no download"
            )
        digest = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
        if digest not in _MD5[file]:
            raise FedjetsError(
                f"data.dir = {str(folder)!r}: {file} is not the published file (its MD5 is {digest});"
                " delete it and download it again"
            )
        digests[Path(file).name] = digest
    return digests


def _from_torchvision(name: str, train: object, test: object) -> Dataset:
    def images(split: object) -> Images:
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()  # type: ignore[attr-defined]
        return Images(pixels, torch.tensor(split.targets))  # type: ignore[attr-defined]

    return Dataset(name, images(train), images(test), tuple(train.classes), CIFAR_MEAN, CIFAR_STD)  # type: ignore[attr-defined]


LOADERS = {"digits": _digits, "cifar10": _cifar10, "cifar100": _cifar100}
