"""What one client holds."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.consent import opted_out, shared
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
from fedjets_flwr.data.domains import as_held
from fedjets_flwr.data.image_folder import cached_images, read_domains, read_folder
from fedjets_flwr.data.partition import Pool, Split, make_split, own_part, public_samples
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import SHARED_OF, TRAIN, UNSEEN
from fedjets_flwr.seeds import numpy_generator


@dataclass(frozen=True)
class ClientData:
    """The local data of a client; ``training`` is false for one that never trains: its labels, if known, only score."""

    client: int
    images: Images
    training: bool


def open_dataset(config: Config) -> Dataset:
    """Return the data set of the settings; of an image folder what lies in ``data.dir``, if anything."""
    if config.data.name != "image-folder":
        return load_dataset(config.data.name, config.data_dir, config.data.download)
    train, test = _shared_images(config)
    mean, std = (CIFAR_MEAN, CIFAR_STD) if config.data.channels == 3 else (GREY_MEAN, GREY_STD)
    return Dataset(config.data.name, train, test, config.class_names, mean, std)


@lru_cache(maxsize=2)
def _shared_images(config: Config) -> tuple[Images, Images]:
    """Return what lies in ``data.dir``, if anything: folders of domains, or a train and a test split."""
    shape = (config.data.channels, config.data.size, config.data.size)
    if config.partition.name == "domains" and config.data.dir:
        return read_domains(config.data_dir, config.domain_names, config.class_names, shape)
    splits = [config.data_dir / name for name in ("train", "test")]
    train, test = (read_folder(f, config.class_names, shape).images if f.is_dir() else no_images(shape) for f in splits)
    return train, test


@lru_cache(maxsize=2)
def open_split(config: Config) -> Split:
    """Return the partition of the settings, made once per process.

    Raises:
        FedjetsError: of an image folder a split lacks a class that is dealt.
    """
    dataset = open_dataset(config)
    if not len(dataset.train):
        raise FedjetsError(f"data.dir = {config.data.dir!r}: no images there to deal; name a folder that has some")
    if config.data.name == "image-folder" and config.partition.name != "domains":
        for folder, images in (("train", dataset.train), ("test", dataset.test)):
            there = set(images.labels.tolist())
            if missing := [name for label, name in enumerate(dataset.classes) if label not in there]:
                raise FedjetsError(
                    f"{config.data_dir / folder}: no image of class {missing[0]!r}, which the partition deals;"
                    " add some, or leave it out of data.classes"
                )
    train, test = (
        Pool(images.labels.numpy(), None if images.domains is None else images.domains.numpy())
        for images in (dataset.train, dataset.test)
    )
    return make_split(config, train, test, len(dataset.classes))


@lru_cache(maxsize=256)
def open_client(config: Config, client: int, folder: Path | None = None, part: str = "train") -> ClientData:
    """Return the data of one client: its own ``folder`` of images, or its part of the shared data set.

    Args:
        config: the settings.
        client: its id.
        folder: of a deployed site's own images.
        part: of a training client's samples, ``train``, ``val``, ``test`` or ``all``; ``shared``, ``shared-val``: what
            of ``train`` or ``val`` takes part in rounds; others' are not split.

    Raises:
        FedjetsError: there are no images, or a training client's have no labels.
    """
    dataset, role = open_dataset(config), config.partition.role_of(client)
    training, within = role == TRAIN, SHARED_OF.get(part, part)
    if folder is not None:
        own = ClientData(client, cached_images(folder, dataset.classes, dataset.shape, config.cache_dir), training)
        if training and not own.images.labelled:
            raise FedjetsError(f"{folder}: a training client's images lie in one folder for each class, named as it")
        everything = np.arange(len(own.images))
        chosen = own_part(config, everything, len(everything), within, client) if training else everything
        if within != part and training:
            chosen = _shared(config, client, chosen)
        return own if chosen is everything else ClientData(client, own.images.subset(chosen), training)
    if not len(dataset.train):
        raise FedjetsError(
            "--node-config: give data-path, this site's folder of images, e.g. 'client-id=0 data-path=\"/data/site0\"'"
        )
    split = open_split(config)
    samples, of_test = split.samples[client], role == UNSEEN
    if training and (split.val or split.test):
        dealt = {"val": split.val, "test": split.test}.get(within)
        samples, of_test = (samples if dealt is None else dealt[client] if dealt else samples[:0]), part == "test"
    elif training:
        samples = own_part(config, samples, len(dataset.train), within)
    if within != part and training:
        samples = _shared(config, client, samples)
    images = (dataset.test if of_test else dataset.train).subset(samples)
    if config.partition.name != "domains" or images.domains is not None:
        return ClientData(client, images, training)
    # Train and test images of the same number are different ones.
    pixels, domains = as_held(config, client, images.pixels, (~samples if of_test else samples).tolist())
    return ClientData(client, Images(pixels, images.labels, domains), training)


def _shared(config: Config, client: int, samples: np.ndarray) -> np.ndarray:
    """Return what of a client's samples takes part in rounds.

    Raises:
        FedjetsError: nothing; the client opted out, and nobody should have asked it, or keeps all to itself.
    """
    if not len(found := shared(config, client, samples)):
        raise FedjetsError(
            f"client {client} has opted out (partition.opt-out): it takes part in no round"
            if client in opted_out(config)
            else f"partition.private-share = {config.partition.private_share:g}: none of the {len(samples)} samples of"
            f" client {client} is left for rounds; lower it"
        )
    return found


def open_public(config: Config) -> Images:
    """Return the labelled samples that lie at the server and no client holds, in a random order; maybe none."""
    train = open_dataset(config).train
    return without_held_out(config, train.subset(public_samples(config, len(train))))


def without_held_out(config: Config, images: Images) -> Images:
    """Return images but for those of ``partition.held-out-domain``, where they are of domains of their own."""
    if images.domains is None or not (name := config.partition.held_out_domain):
        return images
    return images.subset((images.domains != config.domain_names.index(name)).nonzero().flatten().numpy())


def open_global(config: Config) -> ClientData:
    """Return test images of all classes, the same for every client (``participants.global-samples``).

    Raises:
        FedjetsError: there are none here.
    """
    images, count = open_dataset(config).test, config.participants.global_samples
    if not len(images):
        raise FedjetsError("participants.global-samples: there is no shared test split here")
    if not 0 < count < len(images):
        return ClientData(-1, images, False)
    drawn = numpy_generator(config.run.seed, "global test").choice(len(images), count, replace=False)
    return ClientData(-1, images.subset(np.sort(drawn)), False)
