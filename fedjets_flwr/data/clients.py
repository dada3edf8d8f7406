"""What one client holds."""

from dataclasses import dataclass
from functools import lru_cache

from fedjets_flwr.config import Config
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
from fedjets_flwr.data.folders import read_folder
from fedjets_flwr.data.partition import Split, make_split


@dataclass(frozen=True)
class ClientData:
    """The local data of a client; ``training`` is false for an unseen client, whose labels only score."""

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
def open_client(config: Config, client: int) -> ClientData:
    """Return the data of one client of the shared data set."""
    dataset, split = open_dataset(config), open_split(config)
    training = client < split.training
    images = (dataset.train if training else dataset.test).subset(split.samples[client])
    return ClientData(client, images, training)
