"""What one client holds."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import (
    CIFAR_MEAN,
    CIFAR_STD,
    GREY_MEAN,
    GREY_STD,
    Dataset,
    Images,
    load_dataset,
    no_images,
)
from fedjets_flwr.data.image_folder import cached_images, read_folder
from fedjets_flwr.data.partition import Split, make_split
from fedjets_flwr.errors import FedjetsError


@dataclass(frozen=True)
class ClientData:
    """The local data of a client; ``training`` is false for an unseen client, whose labels, if known, only score."""

    client: int
    images: Images
    training: bool


def open_dataset(config: Config) -> Dataset:
    """Return the data set of the settings; of an image folder what lies in ``data.dir``, if anything."""
    if config.data.name != "image-folder":
        return load_dataset(config.data.name, config.data_dir, config.data.download)
    shape = (config.data.channels, config.data.size, config.data.size)
    train, test = (
        read_folder(folder, config.class_names, shape).images if folder.is_dir() else no_images(shape)
        for folder in (config.data_dir / "train", config.data_dir / "test")
    )
    mean, std = (CIFAR_MEAN, CIFAR_STD) if config.data.channels == 3 else (GREY_MEAN, GREY_STD)
    return Dataset(config.data.name, train, test, config.class_names, mean, std)


@lru_cache(maxsize=2)
def open_split(config: Config) -> Split:
    """Return the partition of the settings, made once per process."""
    dataset = open_dataset(config)
    return make_split(config, dataset.train.labels.numpy(), dataset.test.labels.numpy(), len(dataset.classes))


@lru_cache(maxsize=256)
def open_client(config: Config, client: int, folder: Path | None = None) -> ClientData:
    """Return the data of one client: its own ``folder`` of images, or its part of the shared data set.

    Raises:
        FedjetsError: there are no images, or a training client's have no labels.
    """
    dataset, training = open_dataset(config), client < config.partition.clients
    if folder is not None:
        own = ClientData(client, cached_images(folder, dataset.classes, dataset.shape, config.cache_dir), training)
        if training and not own.images.labelled:
            raise FedjetsError(f"{folder}: a training client's images lie in one folder for each class, named as it")
        return own
    if not len(dataset.train):
        raise FedjetsError(
            "--node-config: give data-path, this site's folder of images, e.g. 'client-id=0 data-path=\"/data/site0\"'"
        )
    split = open_split(config)
    images = (dataset.train if training else dataset.test).subset(split.samples[client])
    return ClientData(client, images, training)
