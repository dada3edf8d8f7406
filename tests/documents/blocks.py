"""The blocks of code in the project's documents, found by sybil; each is a test that does what a reader would do.

An HTML comment above a block says what is special about it: ``<!-- slow: four minutes -->`` leaves it to ``make
test-slow``, ``<!-- needs: cifar10 -->`` to machines that have that data set, ``<!-- not run: why -->`` to nobody;
``<!-- file: path -->`` has it written to that file.
"""

import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from fedjets_flwr.config.schema import Config, flatten
from fedjets_flwr.errors import FedjetsError
from tests.documents.shell import ROOT, CommandFailed, Shell, commands

COMMENTS = re.compile(r"(?:^[ \t]*<!--.*-->[ \t]*\n)+\Z", re.MULTILINE)
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->")
NOTES = ("not run", "slow", "needs", "file")
DATA = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""Folder of each data set below $FEDJETS_DATA."""
SLOW_SECONDS = 3600


@dataclass(frozen=True)
class Block:
    """A block of code that a reader can try.

    Attributes:
        notes: what the comments above it say, by one of :data:`NOTES`.
    """

    language: str
    source: str
    notes: dict[str, str]

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """What pytest must know of it."""
        marks = [pytest.mark.skip(reason=why) for why in self.reasons_to_skip]
        return marks + ([pytest.mark.slow, pytest.mark.timeout(SLOW_SECONDS)] if "slow" in self.notes else [])

    @property
    def reasons_to_skip(self) -> list[str]:
        """Why it is not run here."""
        needed = self.notes.get("needs")
        absent = [f"needs {needed} in $FEDJETS_DATA"] if needed and not is_here(needed) else []
        return absent + ([f"not run: {self.notes['not run']}"] if "not run" in self.notes else [])

    @property
    def quick(self) -> bool:
        """Whether it runs with the quick tests."""
        return not self.marks


def is_here(name: str) -> bool:
    """Return whether $FEDJETS_DATA holds a data set."""
    return (Path(os.environ.get("FEDJETS_DATA") or "/nowhere") / DATA[name]).is_dir()


def run_shell(source: str, shell: Shell) -> None:
    """Run the commands of a block."""
    for command in commands(source):
        shell.run(command)


def run_python(source: str, shell: Shell) -> None:
    """Run a block in an interpreter of its own."""
    shell.run(f"python -c {shlex.quote(source)}")


def read_settings(source: str, shell: Shell) -> None:
    """Check that a block of TOML holds settings."""
    Config.from_flat(dict(flatten(tomllib.loads(source))))


LANGUAGES: dict[str, Callable[[str, Shell], None]] = {"bash": run_shell, "python": run_python, "toml": read_settings}


def try_out(block: Block, shell: Shell) -> None:
    """Do what a reader does with a block: type it, or write it to the file that it is for."""
    if "file" in block.notes:
        shell.write(block.notes["file"], block.source)
    else:
        LANGUAGES[block.language](block.source, shell)


def blocks(document: Document) -> Iterator[Region]:
    """Yield the blocks of a Markdown document whose languages can be tried."""
    for region in FencedCodeBlockLexer(language=r"\S+")(document):
        if (language := region.lexemes["language"]) in LANGUAGES:
            block = Block(language, str(region.lexemes["source"]), notes_above(document, region))
            yield Region(region.start, region.end, block, evaluate)


def notes_above(document: Document, region: Region) -> dict[str, str]:
    """Return what the comments directly above a block say.

    Raises:
        ValueError: a comment does not say one of :data:`NOTES` and why.
    """
    above = COMMENTS.search(document.text, 0, region.start)
    notes = {}
    for text in COMMENT.findall(above.group() if above else ""):
        name, _, why = text.partition(": ")
        if name not in NOTES or not why or (name == "needs" and why not in DATA):
            raise ValueError(f"{document.path}, {document.line_column(region.start)}: what does <!-- {text} --> mean?")
        notes[name] = why
    return notes


def evaluate(example: Example) -> str | None:
    """Run a block after all quick ones above it, since it may need what they leave; return what is wrong."""
    ran = example.namespace.setdefault("ran", set())
    for each in example.document.examples():
        if each.start not in ran and (each.start == example.start or each.start < example.start and each.parsed.quick):
            ran.add(each.start)
            try:
                try_out(each.parsed, example.namespace["shell"])
            except (CommandFailed, FedjetsError, tomllib.TOMLDecodeError) as error:
                return str(error)
    return None


def open_copy(namespace: dict[str, object]) -> None:
    """Give a document a fresh copy of the checkout."""
    namespace["shell"] = Shell()


def close_copy(namespace: dict[str, Shell]) -> None:
    """Take it away."""
    namespace["shell"].close()


DOCUMENTS = Sybil(
    [blocks], path=str(ROOT), pattern="*.md", exclude="results/*/*.md", setup=open_copy, teardown=close_copy
)
