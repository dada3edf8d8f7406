"""Images of one class each: crops and flips, cross entropy, right answers."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_client, open_dataset, open_global, open_public, open_split
from fedjets_flwr.data.datasets import Dataset, Spec
from fedjets_flwr.data.transforms import AUGMENTATIONS
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.tasks.base import Inputs, Losses, Samples

CROSS_ENTROPY = Losses(F.cross_entropy, partial(F.cross_entropy, reduction="sum"))
"""The task's own losses, of logits (b, C) and labels (b,)."""


class ImageClassification:
    """The images of ``data.*``, as ``partition.*`` deals them to clients, or a site's own."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dataset: Dataset = open_dataset(config)

    @property
    def spec(self) -> Spec:
        """Shape of an image and names of the classes; of the domains, if clients differ in them."""
        known = self.config.partition.name == "domains" and self.simulates  # a deployed site does not tell
        return replace(self.dataset.spec, kinds=self.config.domain_names if known else ())

    @property
    def classifies(self) -> bool:
        """An image is of one class."""
        return True

    @property
    def tells(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def scores(self) -> Mapping[str, tuple[str, ...]]:
        """Nothing is written."""
        return {}

    @property
    def digest(self) -> str:
        """Return nothing: a pixel means the same everywhere."""
        return ""

    @property
    def simulates(self) -> bool:
        """Whether the images of all clients lie here."""
        return len(self.dataset.train) > 0 and self.config.partition.public_share < 1

    @property
    def has_global(self) -> bool:
        """Whether test images that all clients share lie here."""
        return len(self.dataset.test) > 0

    def deal(self) -> None:
        """Make the partition of the settings."""
        if self.simulates:
            open_split(self.config)

    def known(self, client: int) -> int:
        """Return how many images of the data set a client has."""
        return len(open_split(self.config).samples[client])

    def sample_input(self) -> Tensor:
        """Return a black image, float32 (1, c, h, w)."""
        return torch.zeros(1, *self.spec.shape)

    def samples(self, client: int, folder: Path | None = None, part: str = "train") -> Samples:
        """Return a client's images, uint8 (n, c, h, w), and labels, (n,) int64."""
        if part == "public":
            public = open_public(self.config)
            return Samples(-1, public.pixels, public.labels, public.labelled, False)
        data = open_global(self.config) if part == "global" else open_client(self.config, client, folder, part)
        images = data.images
        return Samples(data.client, images.pixels, images.labels, images.labelled, data.training, images.domains)

    def inputs(self, stored: Tensor, common: CommonExpert, generator: torch.Generator | None = None) -> Inputs:
        """Return how to get normalised images, float32 (b, c, h, w), cropped and flipped as ``data.augment`` says."""
        augment = AUGMENTATIONS[self.config.data.augment if generator is not None else "none"]
        draw = generator if generator is not None else torch.Generator()
        return lambda rows: common.normalise(augment(stored[rows], draw))

    def loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the mean cross entropy of logits (b, C) and labels (b,)."""
        return F.cross_entropy(outputs + offset, targets)

    def total_loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the sum of the cross entropies."""
        return F.cross_entropy(outputs + offset, targets, reduction="sum")

    @property
    def at_once(self) -> int:
        """Images of a batch."""
        return 512

    def predictions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return class probabilities, (b, C)."""
        return outputs.softmax(dim=1)

    def count_right(self, predictions: Tensor, targets: Tensor) -> list[int]:
        """Return right answers and samples."""
        return [int((predictions.argmax(1) == targets).sum()), len(targets)]

    def told(self, predictions: Tensor, samples: Samples) -> dict[str, float]:
        """Return nothing."""
        return {}

    def written(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return nothing."""
        return {}
