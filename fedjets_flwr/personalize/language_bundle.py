"""A language model for one text as a folder: its weights, its tokeniser, and ``card.json`` that says what they are.

A bundle may come from anybody, and is read as carefully as one of images (``bundle``): the card has a schema, no file
name is taken from it, and sizes that it only claims cost no memory.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedjets_flwr.data.text_tokens import LONGEST, Tokens, tokens_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.transformer import LanguageArchitecture, Transformer, sizes_of
from fedjets_flwr.moe.structure import count
from fedjets_flwr.personalize.bundle import (
    CARD,
    FILE_BYTES,
    HEADER_BYTES,
    Count,
    Share,
    filled,
    read_card,
    read_files,
    write_bundle,
)

MODEL = "model.safetensors"
TOKENISER = "tokeniser.json"
FLOAT_BYTES = 4

Size = Annotated[int, Field(ge=1)]
Bits = Annotated[float, Field(ge=0)]


class Sizes(BaseModel):
    """Sizes of the whole model of the run (``LanguageArchitecture``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vocabulary: Size
    context: Size
    width: Size
    heads: Size
    layers: Size
    switch_layers: Size
    experts: Size
    hidden: Size


class BitsPerByte(BaseModel):
    """What is left to guess of text that chose nothing: with the chosen experts, as many drawn ones, and all."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    chosen: Bits
    random: Bits
    whole: Bits


class LanguageCard(BaseModel):
    """What a bundle says of itself.

    Attributes:
        about: the same in a few sentences.
        run: name of the run; ``weights_hash`` is that of its ``summary.json``.
        sizes: of the whole model.
        held: ids of the chosen experts of each Switch layer.
        tokens: what the model reads: byte pairs, which a file beside tells, or bytes.
        memory: the share of all experts that was allowed.
        activation: share of the text's tokens by layer and expert of the whole model, by which experts were chosen.
        tokens_chosen_by: how many those were.
        tokens_scored: tokens of other documents, by which ``bits_per_byte`` was measured.
        sha256: digest of every other file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal["fedjets-language-bundle"] = "fedjets-language-bundle"
    format_version: Literal[1] = 1
    about: str
    strategy: str
    run: str
    rounds: Count
    seed: Count
    weights_hash: str
    sizes: Sizes
    held: tuple[tuple[Count, ...], ...]
    tokens: Literal["pairs", "bytes"]
    memory: Share
    activation: tuple[tuple[Share, ...], ...]
    tokens_chosen_by: Count
    tokens_scored: Count
    bits_per_byte: BitsPerByte
    versions: dict[str, str]
    sha256: dict[str, str] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        s = self.sizes
        if not self.held:
            raise ValueError("held: no experts")
        _ = self.architecture  # refuses what no model has
        if [len(row) for row in self.activation] != [s.experts] * s.switch_layers:
            raise ValueError("activation: not a share for each expert of each layer")
        return self

    @property
    def whole(self) -> LanguageArchitecture:
        """Architecture of the run's model."""
        return LanguageArchitecture(**self.sizes.model_dump())

    @property
    def architecture(self) -> LanguageArchitecture:
        """Architecture of the model in the bundle."""
        return replace(self.whole, held=self.held)

    @property
    def bytes_held(self) -> int:
        """Bytes of the model's weights."""
        return FLOAT_BYTES * sizes_of(self.whole).of(count(self.held))

    @property
    def bytes_whole(self) -> int:
        """Bytes of the weights of the run's model."""
        return FLOAT_BYTES * sizes_of(self.whole).of(self.sizes.experts * self.sizes.switch_layers)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files beside the card."""
        return (MODEL, *([TOKENISER] if self.tokens == "pairs" else []))


def write_language_bundle(folder: StrPath, card: LanguageCard, model: Transformer, tokens: Tokens) -> None:
    """Write a bundle in one step.

    Raises:
        FedjetsError: the folder holds something already, or cannot be written.
    """
    weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
    files = {MODEL: safetensors.torch.save(weights), TOKENISER: tokens.told.encode()}
    write_bundle(folder, card, {name: files[name] for name in card.files})


def read_language_bundle(folder: StrPath) -> tuple[LanguageCard, Transformer, Tokens]:
    """Return the card, the model in eval mode and the tokens of a bundle.

    Raises:
        FedjetsError: names the file that is missing, altered, or no part of a bundle.
    """
    folder = Path(folder)
    card = read_card(folder / CARD, LanguageCard)
    if set(card.sha256) != set(card.files):
        wanted = ", ".join(card.files)
        raise FedjetsError(f"{folder / CARD}: damaged, or of another version (sha256: not the files {wanted})")
    most = {MODEL: min(card.bytes_held + HEADER_BYTES, FILE_BYTES), TOKENISER: 4 * LONGEST}
    files = read_files(folder, card.sha256, most.__getitem__)
    model = filled(lambda: Transformer(card.architecture), files[MODEL], folder / MODEL)
    model.sent = torch.zeros(card.sizes.switch_layers, card.sizes.experts, dtype=torch.int64)  # no part of its weights
    try:
        tokens = tokens_of(files.get(TOKENISER, b"").decode())
        if len(tokens.pieces) != card.sizes.vocabulary:
            raise ValueError(f"of {len(tokens.pieces)} tokens, not {card.sizes.vocabulary}")
    except ValueError as error:
        raise FedjetsError(f"{folder / TOKENISER}: not the tokeniser of this model ({error})") from None
    return card, model, tokens
