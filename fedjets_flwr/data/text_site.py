"""A site's own text, which no other machine has: its documents' parts, as tokens that the run's model reads.

The SHA-256 of a document's name, modulo 10, says which part it is of: 0 to 7 train, 8 validates, 9 tests. A document
whose text an earlier one has is left out.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedjets_flwr.data.site_cache import site_file
from fedjets_flwr.data.text_folder import different, ended, list_own, number_of, read_own
from fedjets_flwr.data.text_sources import MAX_CHARACTERS, Document
from fedjets_flwr.data.text_tokens import Tokens, digest_of, tokens_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.kept import keep, kept
from fedjets_flwr.names import PARTS, Part

log = logging.getLogger("flwr")
FORMAT = 1
"""Of what is kept; another number has all made anew."""


@dataclass(frozen=True, eq=False)
class SiteText:
    """The text of one site.

    Attributes:
        place: its folder or file.
        documents: tokens of each document, int32 (n,), by the document's part, in the order of their files.
        lengths: bytes that each token stands for, (V,).
    """

    place: Path
    documents: dict[Part, tuple[Tensor, ...]]
    lengths: Tensor

    def stream(self, most: int, generator: torch.Generator, *parts: Part) -> Tensor:
        """Return the documents of parts one after another, in an order that is drawn: int64, at most so many tokens.

        Raises:
            FedjetsError: there is none.
        """
        documents = [document for part in parts for document in self.documents[part]]
        if not documents:
            raise FedjetsError(
                f"{self.place}: no document is of the {' or '.join(parts)} part, which the digest of its name decides;"
                " give more documents, or smaller ones"
            )
        order = torch.randperm(len(documents), generator=generator)
        return torch.cat([documents[position] for position in order.tolist()])[:most].long()

    def num_bytes(self, tokens: Tensor) -> int:
        """Return of how many bytes of text tokens (n,) are."""
        return int(self.lengths[tokens].sum())


def part_of(document: Document) -> Part:
    """Return which part a document of a site is of."""
    return {8: "val", 9: "test"}.get(number_of(document.name) % 10, "train")  # type: ignore[return-value]


def read_site(place: Path) -> list[Document]:
    """Return the documents of a site's folder of .txt files or of its one file, each text once.

    A broken file costs itself, and the log counts them.

    Raises:
        FedjetsError: there is no text, none of it can be read, or it is more than fits.
    """
    documents, characters, broken = list[Document](), 0, list[FedjetsError]()
    for document in different(read_own(place, broken.append)):
        documents.append(document)
        characters += len(document.text)
        if characters > MAX_CHARACTERS:
            raise FedjetsError(f"{place}: more than {MAX_CHARACTERS} characters; give fewer or smaller files")
    if broken and documents:
        log.warning("%d files of text are left out, the first is %s", len(broken), broken[0])
    if not documents:
        raise broken[0] if broken else FedjetsError(f"{place}: no text in it")
    return documents


def encode_site(place: Path, tokens: Tokens) -> SiteText:
    """Return a site's text in tokens.

    Raises:
        FedjetsError: as :func:`read_site`.
    """
    documents = read_site(place)
    encoded = tokens.encode([ended(document) for document in documents])
    found = {part: tuple(t for d, t in zip(documents, encoded, strict=True) if part_of(d) == part) for part in PARTS}
    return SiteText(place, found, tokens.lengths)


@lru_cache(maxsize=2)
def open_site(place: Path, tokeniser: str, cache: Path) -> SiteText:
    """Return a site's text in tokens, kept in ``cache`` until a file of it changes.

    Args:
        place: a folder of .txt files, or a file of JSON lines.
        tokeniser: of the run (``Tokens.told``).
        cache: a folder for what is kept; nothing older of the place stays.

    Raises:
        FedjetsError: as :func:`read_site`.
    """
    files = [(path, path.stat()) for path in list_own(place)]
    path = site_file(cache, place, files, (FORMAT, digest_of(tokeniser)))
    if (tensors := kept(path)) is None:
        tensors = _as_tensors(encode_site(place, tokens_of(tokeniser)))
        keep(tensors, path)
    documents = {part: tensors[part].tensor_split(tensors[f"{part}.ends"])[:-1] for part in PARTS}
    return SiteText(place, documents, tensors["lengths"])


def _as_tensors(text: SiteText) -> dict[str, Tensor]:
    tensors = {"lengths": text.lengths}
    for part, documents in text.documents.items():
        tensors[part] = torch.cat([torch.empty(0, dtype=torch.int32), *documents])
        tensors[f"{part}.ends"] = torch.tensor([len(one) for one in documents], dtype=torch.int64).cumsum(0)
    return tensors
