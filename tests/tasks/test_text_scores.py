"""Scores of what is written: known values, and what holds for any text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedjets_flwr.tasks.text_scores import SCORES, accuracy, exact_match, f1, normalised, rouge_2

TEXTS = some.text("ab A.!", max_size=20) | some.lists(some.sampled_from(["the", "cat", "Sat", "on,"])).map(" ".join)
EVERY = [score for scores in SCORES.values() for score in scores.values()]


def test_words_are_compared_as_squad_compares_them() -> None:
    assert normalised("The  Eiffel-Tower,\nin an A-frame!") == ["eiffeltower", "in", "aframe"]
    assert normalised("a. The, an") == []


@pytest.mark.parametrize(
    ("written", "right", "value"),
    [
        ("the cat sat", "A cat sat down.", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("cat cat", "cat dog", 0.5),  # as often as both have it
        ("dog", "cat", 0.0),
        ("the", "an", 1.0),  # no word is left of either
        ("", "cat", 0.0),
    ],
)
def test_f1_of_words(written: str, right: str, value: float) -> None:
    assert f1(written, right) == pytest.approx(value)


@pytest.mark.parametrize(
    ("written", "right", "value"),
    [
        ("police kill the gunman", "police killed the gunman", 1 / 3),  # of three pairs on both sides, as Lin has it
        ("Return the name.", "return THE name of it", 2 * 1 * 0.5 / 1.5),
        ("a a a", "a a", 2 / 3),
        ("Имя файла", "имя файла!", 1.0),
        ("word", "word", 0.0),  # has no pair
        ("", "a b", 0.0),
    ],
)
def test_rouge_2(written: str, right: str, value: float) -> None:
    assert rouge_2(written, right) == pytest.approx(value)


def test_a_label_is_right_or_wrong() -> None:
    assert accuracy(" animal\n", "animal") == 1
    assert accuracy("Animal", "animal") == accuracy("anima", "animal") == accuracy("", "animal") == 0
    assert exact_match("The Animal!", "animal") == 1
    assert exact_match("animal plant", "plant animal") == 0


@given(one=TEXTS, other=TEXTS)
def test_what_holds_for_any_texts(one: str, other: str) -> None:
    for score in EVERY:
        assert 0 <= score(one, other) == score(other, one) <= 1
    assert f1(one, other) >= exact_match(one, other) >= accuracy(one, other)
    assert f1(one, one) == exact_match(one, one) == accuracy(one, one) == 1
    assert f1(" ".join(reversed(one.split())), other) == f1(one, other)
    assert rouge_2(one, one) == (len(re.findall("[a-z]+", one.lower())) > 1)
