"""Text that became tokens, kept until a file of it changes, and what the tokens stand for."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text_tokens import Tokens, as_bytes, learn_pairs
from fedjets_flwr.kept import keep, kept


def cached_tokens(
    config: Config, files: Iterable[Path], made_of: tuple[object, object], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what becomes of text as tokens, kept by the names, sizes and times of its files.

    Args:
        config: ``data.name``, ``text.tokens`` and ``text.vocabulary``, and where the cache is.
        files: of the text.
        made_of: the number of the format, and what else decides the outcome.
        make: makes it anew.
    """
    facts = [(path, path.stat()) for path in files]
    seen = [(str(path), one.st_size, one.st_mtime_ns) for path, one in facts]
    pairs = (config.text.vocabulary, version("tokenizers")) if config.text.tokens == "bpe" else ()
    number, whose = made_of
    named = repr((number, config.data.name, whose, config.text.tokens, pairs, seen))
    path = config.cache_dir / "text" / f"{hashlib.sha256(named.encode()).hexdigest()}.safetensors"
    if (tensors := kept(path)) is None:
        tensors = make()
        keep(tensors, path)
    return tensors


def tokens_for(config: Config, public: Sequence[str]) -> Tokens:
    """Return the tokens that ``text.tokens`` asks for; byte pairs are learnt from public text."""
    return as_bytes() if config.text.tokens == "bytes" else learn_pairs(public, config.text.vocabulary)


def kept_of(tokens: Tokens, digest: bytes) -> dict[str, Tensor]:
    """Return what is kept beside text in tokens: the digest of the text, and what the tokens stand for."""
    told = {"digest": digest, "pieces": b"".join(tokens.pieces), "tokeniser": tokens.told.encode()}
    return {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in told.items()} | {
        "lengths": tokens.lengths
    }
