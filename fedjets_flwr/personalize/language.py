"""A language model for a text that no run has seen, just in time: its experts are chosen, and nothing is trained.

    made = personalise_text(open_language_run("runs/mine"), "letters", memory=0.5)
    made.save("bundle")
    LanguagePersonaliser.load("bundle").score("more-letters")

Experts are chosen as FedMoE's server chooses a client's first ones (arXiv 2408.11304), by the share of tokens that the
whole model sends to each; there is no probe, so that a forward pass is all it takes.
"""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedjets_flwr.data.text_folder import ended, read_own
from fedjets_flwr.data.text_site import encode_site
from fedjets_flwr.data.text_tokens import Tokens, tokens_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.language_pretraining import windows
from fedjets_flwr.models.transformer import Sets, Transformer, joined, parted, sizes_of, transformer_of
from fedjets_flwr.moe.structure import Activation, as_activation, experts_that_fit, initial_sets, random_sets_like
from fedjets_flwr.personalize.inference import cell, place
from fedjets_flwr.personalize.language_bundle import (
    BitsPerByte,
    LanguageCard,
    Sizes,
    read_language_bundle,
    write_language_bundle,
)
from fedjets_flwr.printable import one_line
from fedjets_flwr.runs.trained_language_run import LanguageRun
from fedjets_flwr.seeds import numpy_generator, torch_generator

AT_ONCE = 64
"""Windows of a batch."""


@dataclass(frozen=True)
class FileScore:
    """How well a model tells a document: tokens and bytes of it that were told, and bits a byte; None: of no tokens."""

    file: str
    tokens: int
    num_bytes: int
    bits_per_byte: float | None


@dataclass(frozen=True)
class Scores:
    """How well a model tells documents, one after the other."""

    files: tuple[FileScore, ...]

    @property
    def bits_per_byte(self) -> float | None:
        """Of all bytes alike; None: no document has two tokens."""
        told = [(f.bits_per_byte * f.num_bytes, f.num_bytes) for f in self.files if f.bits_per_byte is not None]
        return sum(bits for bits, _ in told) / sum(n for _, n in told) if told else None

    def csv(self) -> bytes:
        """Return the table ``file,tokens,bytes,bits_per_byte`` in UTF-8."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "tokens", "bytes", "bits_per_byte"))
        for found in self.files:
            bits = "" if found.bits_per_byte is None else f"{found.bits_per_byte:.6f}"
            table.writerow((cell(found.file), found.tokens, found.num_bytes, bits))
        return text.getvalue().encode("utf-8", "surrogateescape")  # a file's name need not be UTF-8


@dataclass(frozen=True)
class LanguagePersonaliser:
    """What all clients share and the experts of one text, ready to score text.

    Attributes:
        card: what it is.
        model: in eval mode, on the device.
        tokens: how text becomes what it reads.
    """

    card: LanguageCard
    model: Transformer
    tokens: Tokens

    @classmethod
    def load(cls, folder: StrPath, device: str = "cpu") -> "LanguagePersonaliser":
        """Return the model in a bundle.

        Raises:
            FedjetsError: a file is missing, altered, or does not fit the others.
        """
        where = place(device)
        card, model, tokens = read_language_bundle(folder)
        return cls(card, model.to(where), tokens)

    def score(self, text: StrPath) -> Scores:
        """Return how well the model tells each document of a folder of .txt files, or of a file.

        Each is read by itself, window by window; its first token is told by nothing and not counted.

        Raises:
            FedjetsError: there is no text, or it cannot be read.
        """
        lengths = self.tokens.lengths
        found = []
        for document in read_own(Path(text)):
            (tokens,) = self.tokens.encode([ended(document)])
            bits, num_bytes = told_bits(self.model, tokens.long(), lengths)
            score = bits / num_bytes if num_bytes else None
            found.append(FileScore(document.name, max(0, len(tokens) - 1), num_bytes, score))
        return Scores(tuple(found))

    def save(self, folder: StrPath) -> None:
        """Write the bundle to a new folder.

        Raises:
            FedjetsError: the folder holds something already, or cannot be written.
        """
        write_language_bundle(folder, self.card, self.model, self.tokens)


def personalise_text(run: LanguageRun, text: StrPath, memory: float = 0.5, device: str = "cpu") -> LanguagePersonaliser:
    """Return the model for a text: of a run's experts those to which the whole model sends most of its tokens.

    Documents whose name's digest ends in 9 score what the others choose (``text_site``), both up to as many tokens as a
    client of the run has to score it and to train and choose by.

    Args:
        run: a trained run on text.
        text: a folder of .txt files, or a file of JSON lines.
        memory: share of all experts that may be chosen, above 0 and up to 1, as in ``fedmoe.memory``.
        device: where to compute, e.g. ``cuda``.

    Raises:
        FedjetsError: names the option, file or setting that is wrong.
    """
    where, a, tokens, limits = place(device), run.architecture, tokens_of(run.tokeniser), run.config.text
    most = _allowed(run, memory)
    site, seed = encode_site(Path(text), tokens), run.config.run.seed
    size = limits.train_tokens + limits.val_tokens
    choosing = site.stream(size, torch_generator(seed, "just in time"), "train", "val")
    scoring = site.stream(limits.test_tokens, torch_generator(seed, "just in time test"), "test")
    if min(len(choosing), len(scoring)) < 2:
        raise FedjetsError(f"{text}: less than two tokens choose or score; give more text")
    whole = model_of(run, a.sets).to(where)
    activation = activation_of(whole, choosing)
    held = initial_sets(activation, most)
    chosen = model_of(run, held).to(where)
    drawn = model_of(run, random_sets_like(held, a.experts, numpy_generator(seed, "just in time sets"))).to(where)
    models = {"chosen": chosen, "random": drawn, "whole": whole}
    bits = {name: bits_per_byte(model, scoring, site.lengths) for name, model in models.items()}
    if not all(map(math.isfinite, bits.values())):
        raise FedjetsError(f"{run.folder}: its model answers with numbers that are not finite")
    card = _card(run, held, memory, activation, (len(choosing), len(scoring)), BitsPerByte(**bits))
    return LanguagePersonaliser(card, chosen, tokens)


def _allowed(run: LanguageRun, memory: float) -> int:
    """Return how many experts a share of memory holds."""
    a, sizes, fit = run.architecture, sizes_of(run.architecture), 0
    if 0 < memory <= 1:
        room = (memory + 1e-6) * a.switch_layers * a.experts * sizes.expert  # a share that was told with six digits
        fit = min(a.switch_layers * a.experts, experts_that_fit(sizes.dense + room, sizes.dense, sizes.expert))
    if fit < a.switch_layers:
        raise FedjetsError(
            f"--memory {memory:g}: give a share of all experts, from {1 / a.experts:g} (one in each layer) to 1"
        )
    return fit


def model_of(run: LanguageRun, held: Sets) -> Transformer:
    """Return a run's model with some of its experts, in eval mode: the whole one with the other rows at -infinity."""
    module = build(replace(run.architecture, held=held), 0).eval().requires_grad_(False)
    FlatModel(module).load(joined(parted(run.vector, run.architecture), held))
    return transformer_of(module)


def _batches(tokens: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows (b, t) of tokens (n,) and the tokens after each; every token but the first is told once."""
    done = 0
    if (cut := windows(tokens, context)) is not None:
        done = cut[0].numel()
        yield from zip(*(part.split(AT_ONCE) for part in cut), strict=True)
    if len(tokens) - done > 1:
        yield tokens[None, done:-1], tokens[None, done + 1 :]


@torch.inference_mode()
def activation_of(model: Transformer, tokens: Tensor) -> Activation:
    """Return the share of tokens (n,) that a model sends to each of its experts, (L, E)."""
    model.sent.zero_()
    for inputs, _ in _batches(tokens, model.architecture.context):
        model(inputs.to(model.embedding.device))
    return as_activation((model.sent.double() / model.sent.sum(dim=1, keepdim=True)).numpy())


@torch.inference_mode()
def told_bits(model: Transformer, tokens: Tensor, lengths: Tensor) -> tuple[float, int]:
    """Return how many bits a model needs for tokens (n,) after the first, and of how many bytes those are.

    ``lengths``: bytes that each token stands for, (V,).
    """
    nats = 0.0
    for inputs, targets in _batches(tokens, model.architecture.context):
        logits = model(inputs.to(model.embedding.device)).flatten(0, 1)
        each = F.cross_entropy(logits, targets.flatten().to(logits.device), reduction="none")
        nats += float(each.sum(dtype=torch.float64))
    return nats / math.log(2), int(lengths[tokens[1:]].sum())


def bits_per_byte(model: Transformer, tokens: Tensor, lengths: Tensor) -> float:
    """Return how many bits a byte a model needs for tokens (n,), two at least (:func:`told_bits`)."""
    bits, num_bytes = told_bits(model, tokens, lengths)
    return bits / num_bytes


def _card(
    run: LanguageRun,
    held: Sets,
    memory: float,
    activation: Activation,
    used: tuple[int, int],
    bits: BitsPerByte,
) -> LanguageCard:
    """Return what a bundle says of itself; ``used``: tokens that chose, and that scored."""
    c, a, name = run.config, run.architecture, one_line(run.folder.name)
    about = (
        f"A language model for one text: of the federated run {name} ({c.strategy.name}) what all clients"
        f" share, and {sum(map(len, held))} of {a.switch_layers * a.experts} experts, those to which the whole model"
        f" sends most of the text's tokens. Nothing was trained; of the text it tells their shares (activation), how"
        " many tokens it has, and bits_per_byte. Use it with `fedjets predict` or fedjets_flwr.personalize.language."
    )
    names = ("vocabulary", "context", "width", "heads", "layers", "switch_layers", "experts", "hidden")
    return LanguageCard(
        about=about,
        strategy=c.strategy.name,
        run=name,
        rounds=run.summary["rounds"],
        seed=c.run.seed,
        weights_hash=run.summary["weights_hash"],
        sizes=Sizes(**{name: getattr(a, name) for name in names}),
        held=held,
        tokens="pairs" if run.tokeniser else "bytes",
        memory=memory,
        activation=activation,
        tokens_chosen_by=used[0],
        tokens_scored=used[1],
        bits_per_byte=bits,
        versions={name: version(name) for name in ("fedjets-flwr", "torch", "safetensors", "tokenizers")},
    )
