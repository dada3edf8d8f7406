"""What all tasks on text have in common."""

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Spec


class OfText:
    """Samples are tokens of some domain's text; what is to be told is text, too, and of no class."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def spec(self) -> Spec:
        """Length of a sample, and names of the domains; the tokens are too many to have names."""
        return Spec((self.config.language_model.context,), (), self.config.text_domains)

    @property
    def classifies(self) -> bool:
        """A text is of no class."""
        return False

    @property
    def tells(self) -> tuple[str, ...]:
        """Bits per byte, and the position of the text's domain."""
        return ("bits-per-byte", "domain")

    @property
    def has_global(self) -> bool:
        """There is no text that all clients share."""
        return False

    def sample_input(self) -> Tensor:
        """Return a sample of the first token, int64 (1, T)."""
        return torch.zeros(1, *self.spec.shape, dtype=torch.int64)
