"""Text of one's own: for each domain a folder of .txt files, or a file of JSON lines."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fedjets_flwr.data.text_sources import Document, read_text
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.reading import JSON, parse


def list_files(folder: Path, domain: str) -> list[Path]:
    """Return the files of a domain: ``folder/domain/**/*.txt`` in the order of their paths, or ``folder/domain.jsonl``.

    Raises:
        FedjetsError: there is neither, or both.
    """
    named, lines = folder / domain, lines_of(folder, domain)
    if named.is_dir() and lines.exists():
        raise FedjetsError(f"{lines}: {named} is there, too; a domain is a folder or a file: remove one of them")
    if lines.is_file():
        return [lines]
    if not named.is_dir():
        raise FedjetsError(f"text.domains: neither {named}/ nor {lines} is there; data.dir names the folder of both")
    return _texts_in(named)


def list_own(place: Path) -> list[Path]:
    """Return the files of somebody's own text: ``place/**/*.txt`` in the order of their paths, or ``place`` itself.

    Raises:
        FedjetsError: it is neither a folder with text, nor a text file, nor a file of JSON lines.
    """
    if place.is_file() and place.suffix in (".txt", ".jsonl"):
        return [place]
    if not place.is_dir():
        raise FedjetsError(f"{place}: neither a folder of .txt files nor such a file, nor one of JSON lines (.jsonl)")
    return _texts_in(place)


def read_own(place: Path) -> Iterator[Document]:
    """Yield the documents of somebody's own text (:func:`list_own`, :func:`read_files`)."""
    return read_files(list_own(place), place if place.is_dir() else place.parent)


def _texts_in(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.txt"))
    files = [path for path in found if not _hidden(path.relative_to(folder)) and path.is_file()]
    if not files:
        raise FedjetsError(f"{folder}: no text in it (files that end in .txt)")
    return files


def lines_of(folder: Path, domain: str) -> Path:
    """Return where the file of JSON lines of a domain lies, if there is one.

    Raises:
        FedjetsError: the domain's name is none of a file in that folder.
    """
    if domain.startswith(".") or set(domain) & {*"/\\"}:
        raise FedjetsError(f"text.domains: {domain!r} is no plain name of a folder")
    return folder / f"{domain}.jsonl"


def objects_of(path: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield (where it stands, its number, itself) of each line of a file of JSON lines; what is no object is empty.

    Raises:
        FedjetsError: the file cannot be read, or a line is no JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            found = parse(line, JSON, where)
            yield where, str(number), found if isinstance(found, dict) else {}


def read_files(files: Sequence[Path], folder: Path) -> Iterator[Document]:
    """Yield the documents of files: each .txt file is one, and so is each line of JSON lines.

    A file's name is its path below ``folder``. A line is an object with ``text`` and maybe ``name``; without one, its
    number is its name.

    Raises:
        FedjetsError: a file or a line is no such thing.
    """
    for path in files:
        if path.suffix != ".jsonl":
            yield Document(path.relative_to(folder).as_posix(), read_text(path))
            continue
        for where, number, found in objects_of(path):
            name, words = found.get("name", number), found.get("text")
            if not isinstance(words, str) or not isinstance(name, str):
                raise FedjetsError(f'{where}: expected an object like {{"name": "a", "text": "Once …"}}')
            yield Document(name, words)


def different(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents that have text, each text once."""
    seen = set[bytes]()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def ended(document: Document) -> str:
    """Return a document's text with the line break that it ends in, wherever it becomes tokens."""
    return document.text if document.text.endswith("\n") else document.text + "\n"


def number_of(name: str) -> int:
    """Return the SHA-256 of a document's name as a number, whose last digits say which part a document is of."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
