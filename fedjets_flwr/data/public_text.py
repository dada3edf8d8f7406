"""What a language model is pretrained on: the public part of any text."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text import open_text
from fedjets_flwr.data.text_tasks import open_tasks
from fedjets_flwr.data.text_tokens import Asked


class PublicText(Protocol):
    """Text as tokens, some of which anybody may see."""

    @property
    def vocabulary(self) -> int:
        """V, number of different tokens, which are 0 to V - 1."""

    @property
    def digest(self) -> str:
        """SHA-256 of all text, public or not."""

    @property
    def tokeniser(self) -> str:
        """What makes the same tokens of text elsewhere; empty: bytes, or nothing does."""

    @property
    def public(self) -> Tensor:
        """What anybody may train on: int64 (n,)."""

    @property
    def public_asked(self) -> Asked | None:
        """Where something is asked for in it; None: nowhere."""

    @property
    def public_held_out(self) -> Tensor:
        """Public text that no training sees: int64 (n,)."""


OPENERS: Mapping[str, Callable[[Config], PublicText]] = {
    "text": open_text,
    "text-folder": open_text,
    "tasks": open_tasks,
    "task-folder": open_tasks,
}
"""What opens text, by ``data.name``."""


def open_public_text(config: Config) -> PublicText:
    """Return the text of the settings.

    Raises:
        FedjetsError: it is missing, damaged or too little.
    """
    return OPENERS[config.data.name](config)
