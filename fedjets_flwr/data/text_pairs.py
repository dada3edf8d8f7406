"""Inputs and what is to be written for each: of domains of text, by readers of their own, or of files of one's own.

Small stand-ins for the data sets of FedMoE (arXiv 2408.11304), which are told in brackets: real text, from where
``fedjets text`` gets it. A file of one's own brings them back.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fedjets_flwr.data.text_folder import lines_of, objects_of
from fedjets_flwr.data.text_sources import (
    MAX_MODULE,
    chapter_name,
    module_name,
    parsed,
    read_text,
    synsets_of,
    verses_of,
)
from fedjets_flwr.errors import FedjetsError

TOPICS = {5: "animal", 6: "artifact", 18: "person", 20: "plant"}
"""Lexicographers' files of WordNet: those with most nouns."""
MASK = "____"
"""In place of the name that is asked for."""
VERSES = 4
"""Of a question; the last has the gap."""
CAPITALISED = re.compile(r"\b[A-Z][a-z]+\b")
SENTENCE = re.compile(r"(?<=[.!?])\s|\n\s*\n")
"""Where a sentence ends, or a paragraph."""


@dataclass(frozen=True)
class Pair:
    """An input and its target, both some text, and a name that decides the split that they are of."""

    name: str
    input: str
    target: str


@dataclass(frozen=True)
class PairSource:
    """A task on a domain of text.

    Attributes:
        about: what is asked.
        score: how answers are scored, one of the names that ``text.scores`` may have.
        read: the domain's files -> its pairs, in a fixed order.
    """

    about: str
    score: str
    read: Callable[[Sequence[Path]], Iterator[Pair]]


def _read_topics(files: Sequence[Path]) -> Iterator[Pair]:
    """Yield glosses of nouns, each with what it is a gloss of."""
    for synset in synsets_of(files):
        if synset.kind in TOPICS:
            yield Pair(synset.name, synset.gloss, TOPICS[synset.kind])


def _read_names(files: Sequence[Path]) -> Iterator[Pair]:
    """Yield each four verses of a chapter whose last has a name that the others have, too: the last such name.

    A name is a word that begins with a capital, and never without one anywhere.
    """
    verses = verses_of(files)
    common = {word for _, text in verses for word in re.findall(r"\b[a-z]+\b", text)}
    for chapter, found in groupby(verses, lambda verse: chapter_name(verse[0])):
        texts = [" ".join(text.split()) for _, text in found]
        for end in range(VERSES, len(texts) + 1):
            *before, last = texts[end - VERSES : end]
            said = {name for text in before for name in CAPITALISED.findall(text) if name.lower() not in common}
            if names := [name for name in CAPITALISED.findall(last) if name in said]:
                asked = re.sub(rf"\b{names[-1]}\b", MASK, last)
                yield Pair(chapter, " ".join([*before, asked]), names[-1])


def _read_summaries(files: Sequence[Path]) -> Iterator[Pair]:
    """Yield the source of each function without its docstring, and the first sentence of that."""
    for path in files:
        text = read_text(path, MAX_MODULE)
        lines = [line.decode() for line in text.encode().splitlines()]  # as the parser counts them
        for node in ast.walk(parsed(text, path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not (words := ast.get_docstring(node)):
                continue
            first = SENTENCE.split(words.strip(), maxsplit=1)[0].encode(errors="replace").decode()
            start, end = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
            if first and start > node.lineno:
                source = [*lines[node.lineno - 1 : start - 1], *lines[end : node.end_lineno]]
                margin = " " * node.col_offset
                shown = "\n".join(line.removeprefix(margin) for line in source)
                yield Pair(module_name(path), shown, " ".join(first.split()))


PAIRS: Mapping[str, PairSource] = {
    "glosses": PairSource("which of four topics a gloss is of (AG News)", "accuracy", _read_topics),
    "scripture": PairSource("the name that verses leave out (SQuAD)", "f1", _read_names),
    "code": PairSource("what a function does, in a sentence (XSum)", "rouge-2", _read_summaries),
}
"""Tasks by the domain of their text."""


def pair_file(folder: Path, domain: str) -> Path:
    """Return the file of a task of one's own, ``folder/domain.jsonl``.

    Raises:
        FedjetsError: it is not there.
    """
    path = lines_of(folder, domain)
    if not path.is_file():
        raise FedjetsError(f"text.domains: {path} is not there; data.dir names its folder")
    return path


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file of JSON lines.

    A line is an object with ``input`` and ``target``; maybe with ``name``, else its number is its name; and maybe with
    ``task``, which then is the file's.

    Raises:
        FedjetsError: a line is no such thing.
    """
    for where, number, found in objects_of(path):
        texts = [found.get("name", number), found.get("input"), found.get("target")]
        name, given, wanted = (text if isinstance(text, str) else "" for text in texts)
        if not given.strip() or not wanted.strip() or not isinstance(texts[0], str):
            like = f'{{"task": "{path.stem}", "input": "Once …", "target": "a tale"}}'
            raise FedjetsError(f"{where}: expected an object like {like}, neither of them blank")
        if found.get("task", path.stem) != path.stem:
            raise FedjetsError(f"{where}: is of another task than {path.stem}, by which the file is named")
        yield Pair(name, given, wanted)
