"""Text as numbers: bytes, or byte-level byte pairs (BPE), which lose nothing either: tokens are whole bytes of it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

NOTHING = -1
"""In place of a token: there is none, or none is to be told."""
BATCH = 1000
"""Texts that are encoded at once: what the library makes of each is some ten times its size."""
LONGEST = 10_000_000
"""Characters of a tokeniser as text: one of 65536 pairs has some two million."""
LONGEST_PIECE = 1000
"""Bytes that a token may stand for."""


@dataclass(frozen=True)
class Tokens:
    """A way to write text as numbers.

    Attributes:
        pieces: the bytes that each token stands for.
        encode: texts -> int32 (n,) of each.
        told: what :func:`tokens_of` makes the same of; empty: bytes.
    """

    pieces: tuple[bytes, ...]
    encode: Callable[[Sequence[str]], list[Tensor]]
    told: str = ""

    @property
    def lengths(self) -> Tensor:
        """How many bytes each token stands for, int64 (V,)."""
        return torch.tensor([len(piece) for piece in self.pieces])


class _Pairs(BaseModel):
    """Byte pairs as a file tells them.

    Attributes:
        pieces: of each token, in the letters of byte-level BPE.
        merges: tokens that become one where they stand side by side, the first ones first.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    pieces: list[str]
    merges: list[tuple[int, int]]


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
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=list(_alphabet()), show_progress=False, max_token_length=LONGEST_PIECE
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    ids: dict[str, int] = learnt["vocab"]
    merges = [(ids[left], ids[right]) for left, right in learnt["merges"]]
    return tokens_of(_Pairs(pieces=sorted(ids, key=ids.__getitem__), merges=merges).model_dump_json())


def check_told(told: str, vocabulary: int) -> None:
    """Check what somebody calls the tokeniser of a model; empty: bytes, or a model that came without one.

    A model may read more tokens than stand for text, such as the signs between a text and what is asked for.

    Raises:
        ValueError: it is none, or of more tokens than the model reads.
    """
    if told and len(_read(told).pieces) > vocabulary:
        raise ValueError(f"a tokeniser of more than {vocabulary} tokens")


def tokens_of(told: str) -> Tokens:
    """Return the tokens that somebody tells (:attr:`Tokens.told`).

    Raises:
        ValueError: they are none.
    """
    if not told:
        return as_bytes()
    # Only pieces and merges come from elsewhere: the library's own format may hold programs to match text by.
    from tokenizers import Tokenizer, models, pre_tokenizers  # only who writes text as pairs needs it

    pairs = _read(told)
    ids = {piece: token for token, piece in enumerate(pairs.pieces)}
    merges = [(pairs.pieces[left], pairs.pieces[right]) for left, right in pairs.merges]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        batches = (tokenizer.encode_batch_fast(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH))
        return [torch.tensor(found.ids, dtype=torch.int32) for batch in batches for found in batch]

    alphabet = _alphabet()
    return Tokens(tuple(bytes(alphabet[letter] for letter in piece) for piece in pairs.pieces), encode, told)


def digest_of(told: str) -> str:
    """Return a SHA-256 that tells whether two machines write text as the same numbers."""
    return hashlib.sha256(told.encode()).hexdigest()


def _read(told: str) -> _Pairs:
    """Return byte pairs that anybody may have written down.

    Raises:
        ValueError: they are none; one line.
    """
    if len(told) > LONGEST:
        raise ValueError(f"a tokeniser of more than {LONGEST} characters")
    try:
        pairs = _Pairs.model_validate_json(told)
    except ValidationError as error:
        raise ValueError(f"a tokeniser that cannot be read ({error.errors(include_input=False)[0]['msg']})") from None
    alphabet, known = set(_alphabet()), set(pairs.pieces)
    if len(known) < len(pairs.pieces) or not alphabet <= known:
        raise ValueError("a tokeniser whose tokens are not different, or that lacks some byte")
    if not all(0 < len(piece) <= LONGEST_PIECE and alphabet.issuperset(piece) for piece in pairs.pieces):
        raise ValueError("a tokeniser with a token that stands for no bytes, or too many")
    tokens = range(len(pairs.pieces))
    if not all(
        left in tokens and right in tokens and pairs.pieces[left] + pairs.pieces[right] in known
        for left, right in pairs.merges
    ):
        raise ValueError("a tokeniser that makes tokens which it has not")
    return pairs


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
