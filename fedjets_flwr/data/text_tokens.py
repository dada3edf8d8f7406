"""Text as numbers: bytes, or byte-level byte pairs (BPE), which lose nothing either: tokens are whole bytes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

NOTHING = -1
"""In place of a token: there is none, or none is to be told."""
BATCH = 1000
"""Texts that are encoded at once: what the library makes of each is some ten times its size."""


@dataclass(frozen=True)
class Tokens:
    """A way to write text as numbers.

    Attributes:
        pieces: the bytes that each token stands for.
        encode: texts -> int32 (n,) of each.
    """

    pieces: tuple[bytes, ...]
    encode: Callable[[Sequence[str]], list[Tensor]]


@dataclass(frozen=True)
class Asked:
    """Where in text, tokens (n,), something is asked for.

    Attributes:
        begins: places where a window of it may begin, int64 (k,); each has what is asked for.
        targets: the tokens that are asked for, int64 (n,), ``NOTHING`` elsewhere.
    """

    begins: Tensor
    targets: Tensor


def as_bytes() -> Tokens:
    """Return the 256 bytes as tokens."""
    return Tokens(tuple(bytes([value]) for value in range(256)), lambda texts: [_bytes(text) for text in texts])


def learn_pairs(texts: Sequence[str], vocabulary: int) -> Tokens:
    """Return byte-level byte pairs that are frequent in texts; the same for the same texts.

    Args:
        texts: what they are learnt from.
        vocabulary: different tokens; fewer if the texts hold fewer pairs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # only who reads text needs it

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = _alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        batches = (tokenizer.encode_batch_fast(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
        return [torch.tensor(found.ids, dtype=torch.int32) for batch in batches for found in batch]

    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return Tokens(tuple(bytes(alphabet[letter] for letter in name) for name, _ in names), encode)


def pieces_of(joined: Tensor, lengths: Tensor) -> list[bytes]:
    """Return the bytes of each token, of those of all tokens one after another and of how many each has."""
    whole = joined.numpy().tobytes()
    return [whole[start:end] for start, end in pairwise([0, *lengths.cumsum(0).tolist()])]


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(torch.int32)


def _alphabet() -> dict[str, int]:
    """Return the letter by which byte-level BPE writes each byte (Radford et al. 2019): itself if it can be printed.

    Others are the letters from 256 on, in turn.
    """
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in printed]
    return {chr(value): value for value in printed} | {chr(256 + turn): value for turn, value in enumerate(others)}
