"""Byte pairs that one machine tells another: the same numbers for the same text, and nothing else is taken."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fedjets_flwr.data.text_tokens import LONGEST_PIECE, as_bytes, check_told, learn_pairs, tokens_of

TEXTS = [f"the king of number {number} went to the river, and it's öld" for number in range(50)]
LEARNT = learn_pairs(TEXTS, 300)


def librarys_own() -> Tokenizer:
    """Return what the library learns from the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer


LIBRARYS = librarys_own()


@settings(max_examples=50, deadline=None)
@given(text=some.text(max_size=60) | some.lists(some.sampled_from(TEXTS)).map(" ".join))
def test_what_is_told_makes_the_tokens_that_were_learnt(text: str) -> None:
    again = tokens_of(LEARNT.told)
    (found,) = again.encode([text])
    assert found.tolist() == LEARNT.encode([text])[0].tolist() == LIBRARYS.encode(text).ids
    assert b"".join(again.pieces[token] for token in found.tolist()) == text.encode()
    assert again.pieces == LEARNT.pieces


def test_bytes_need_not_be_told() -> None:
    assert as_bytes().told == ""
    assert tokens_of("").pieces == as_bytes().pieces
    check_told("", 17)


def test_a_tokeniser_of_another_number_of_tokens_is_refused() -> None:
    check_told(LEARNT.told, len(LEARNT.pieces))
    with pytest.raises(ValueError, match="of other than 299 tokens"):
        check_told(LEARNT.told, 299)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(LEARNT.told) | changes)


PIECES: list[str] = json.loads(LEARNT.told)["pieces"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (" " * 10_000_001, "of more than 10000000 characters"),
        (changed(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}), "cannot be read"),
        (changed(pieces=[1, 2]), "cannot be read"),
        (changed(pieces=PIECES[1:]), "lacks some byte"),
        (changed(pieces=[*PIECES, PIECES[0]]), "are not different"),
        (changed(pieces=[*PIECES, ""]), "stands for no bytes"),
        (changed(pieces=[*PIECES, "\u2603"]), "stands for no bytes"),
        (changed(pieces=[*PIECES, "a" * (LONGEST_PIECE + 1)]), "or too many"),
        (changed(merges=[[0, 10**9]]), "makes tokens which it has not"),
        (changed(merges=[[-1, 0]]), "makes tokens which it has not"),
        (changed(merges=[[0, 0]]), "makes tokens which it has not"),
        (changed(merges=[["a", "b"]]), "cannot be read"),
    ],
)
def test_what_is_no_tokeniser_is_one_line(told: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        tokens_of(told)
    assert "\n" not in str(caught.value)
