"""How good a text is that was written for another: 0 to 1, by a text that is right."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

ARTICLES = frozenset(["a", "an", "the"])


def normalised(text: str) -> list[str]:
    """Return the words of a text as SQuAD compares them: no capitals, punctuation or articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in plain.split() if word not in ARTICLES]


def accuracy(written: str, right: str) -> float:
    """Return 1 if both are the same but for blanks."""
    return float(written.split() == right.split())


def exact_match(written: str, right: str) -> float:
    """Return 1 if both have the same normalised words in the same order (Rajpurkar et al. 2016)."""
    return float(normalised(written) == normalised(right))


def f1(written: str, right: str) -> float:
    """Return the F1 of normalised words; of two texts, of which one has none, whether both have none."""
    one, other = normalised(written), normalised(right)
    return float(one == other) if not one or not other else _overlap(one, other)


def rouge_2(written: str, right: str) -> float:
    """Return the F1 of pairs of adjacent words (Lin 2004), which are runs of letters and digits, without stemming."""
    one, other = (list(pairwise(re.findall(r"[^\W_]+", text.lower()))) for text in (written, right))
    return _overlap(one, other)


def _overlap(one: Sequence[object], other: Sequence[object]) -> float:
    """Return the F1 of two bags: 2 |both| / (|one| + |other|), 0 where there is nothing."""
    both = (Counter(one) & Counter(other)).total()
    return 2 * both / (len(one) + len(other)) if both else 0.0


SCORES: Mapping[str, Mapping[str, Callable[[str, str], float]]] = {
    "accuracy": {"accuracy": accuracy},
    "f1": {"f1": f1, "exact-match": exact_match},
    "rouge-2": {"rouge-2": rouge_2},
}
"""What is told of a task, by the names that ``text.scores`` may have."""
