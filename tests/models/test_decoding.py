"""Greedy decoding: all at once gives what one token after the other gives."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.decoding import greedy
from fedjets_flwr.models.transformer import LanguageArchitecture

VOCABULARY, END = 4, 3


class Counted:
    """A model whose next token depends on all before it, or on how many there are alone; counts its passes."""

    def __init__(self, seed: int, by_content: bool = True) -> None:
        self.seed, self.by_content, self.passes = seed, by_content, 0

    def next(self, before: tuple[int, ...]) -> int:
        known = before if self.by_content else len(before)
        return random.Random(repr((self.seed, known))).randrange(VOCABULARY)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        told = [[self.next(tuple(row[: end + 1])) for end in range(len(row))] for row in tokens.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(told), VOCABULARY).float()


def one_by_one(model: Counted, prompt: list[int], most: int) -> list[int]:
    written: list[int] = []
    for _ in range(most):
        written.append(END if END in written else model.next((*prompt, *written)))
    return written


PROMPTS = some.lists(some.lists(some.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4)


@given(prompts=PROMPTS, most=some.integers(1, 6), seed=some.integers(0, 1000), spare=some.integers(0, 3))
def test_all_at_once_is_one_after_the_other(prompts: list[list[int]], most: int, seed: int, spare: int) -> None:
    wide = max(map(len, prompts)) + spare
    padded = torch.tensor([prompt + [-1] * (wide - len(prompt)) for prompt in prompts])
    model, before = Counted(seed), padded.clone()
    assert greedy(model, padded, most, END).tolist() == [one_by_one(model, prompt, most) for prompt in prompts]
    assert model.passes <= most
    assert torch.equal(padded, before)


def test_what_depends_on_nothing_before_it_takes_two_passes() -> None:
    model = Counted(1, by_content=False)
    found = greedy(model, torch.tensor([[0], [1]]), 20, END)
    assert found[0].tolist() == found[1].tolist() == one_by_one(model, [0], 20)
    assert model.passes <= 2


def test_a_transformer_writes_what_it_would_one_by_one() -> None:
    model = build(LanguageArchitecture(9, 12, 8, 2, 3, 2, 3, 6), 1).eval()
    prompts = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    found = greedy(model, prompts, 8, end=8)
    for prompt, written in zip(([1, 2, 3, 4], [5, 6]), found.tolist(), strict=True):
        told = list(prompt)
        for _ in range(8):
            told.append(8 if 8 in told else int(model(torch.tensor([told]))[0, -1].argmax()))
        assert written == told[len(prompt) :]
