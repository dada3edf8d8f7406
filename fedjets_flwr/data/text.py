"""Text of different domains, as tokens: the public part, and what each client holds.

The SHA-256 of a document's name, modulo 10, says which split it is of: 0 to 4 are public, 5 to 8 are the clients' to
train and choose by, 9 scores them. The next digit holds a tenth of the public documents out of training. Nobody has the
public part of a domain that is not among ``text.public-domains``. Where clients have text of their own (``text_site``),
all that lies here is public. A document whose text an earlier one of its domain has is left out.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text_cache import cached_tokens, kept_of, tokens_for
from fedjets_flwr.data.text_folder import different, ended, list_files, number_of, read_files
from fedjets_flwr.data.text_sources import MAX_CHARACTERS, SOURCES, Document, files_of
from fedjets_flwr.data.text_tokens import pieces_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import VALIDATION, Part
from fedjets_flwr.seeds import torch_generator

log = logging.getLogger("flwr")
PUBLIC, HELD_OUT, FEDERATED, TEST = SPLITS = ("public", "held-out", "federated", "test")
FORMAT = 2
"""Of what is kept; another number has all made anew."""


@dataclass(frozen=True)
class TextPart:
    """A client's text.

    Attributes:
        tokens: int64 (n,).
        num_bytes: of the text that they stand for.
        domain: position in :attr:`TextSplit.domains`.
    """

    tokens: Tensor
    num_bytes: int
    domain: int


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Who holds which text.

    Attributes:
        domains: names of the domains.
        vocabulary: V, number of different tokens, which are 0 to V - 1.
        digest: SHA-256 over the domains' names and their documents, which tells whether two machines have the same.
    """

    domains: tuple[str, ...]
    vocabulary: int
    digest: str
    _config: Config = field(repr=False)
    _tensors: dict[str, Tensor] = field(repr=False)
    _streams: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def public(self) -> Tensor:
        """What anybody may train on: int64 (n,), documents of all domains mixed."""
        return self._tensors[PUBLIC].long()

    @property
    def public_asked(self) -> None:
        """Nothing is asked for in it."""

    @cached_property
    def public_held_out(self) -> Tensor:
        """Public text that no training sees: int64 (n,), documents of all domains mixed."""
        return self._tensors[HELD_OUT].long()

    def domain_of(self, client: int) -> int:
        """Return which domain a client's text is of: clients of a role hold all in turn, from the first on."""
        return self._config.domain_of(client)

    def client(self, client: int, part: Part) -> TextPart:
        """Return a part of a client's text, which no other part and no other client has.

        Args:
            client: its id.
            part: what it trains on, chooses by or is scored on. Only what scores is of documents apart from all
                others', and not for validation clients: settings that they choose must not know those.
        """
        split, domain, start, end = self._slices[client, part]
        tokens = self._stream(split, domain)[start:end].long()
        return TextPart(tokens, self.num_bytes(tokens), domain)

    def num_bytes(self, tokens: Tensor) -> int:
        """Return of how many bytes of text tokens (n,) are."""
        return int(self._tensors["lengths"][tokens].sum())

    def decode(self, tokens: Tensor) -> bytes:
        """Return the text of tokens (n,) in UTF-8; a slice may begin or end within a character."""
        return b"".join(self._pieces[token] for token in tokens.tolist())

    @property
    def tokeniser(self) -> str:
        """What makes the same tokens elsewhere (``Tokens.told``)."""
        return self._tensors["tokeniser"].numpy().tobytes().decode()

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token."""
        return pieces_of(self._tensors["pieces"], self._tensors["lengths"])

    def check(self) -> None:
        """Check that there is enough text.

        Raises:
            FedjetsError: there is not.
        """
        for split in (PUBLIC, HELD_OUT):
            if not len(self._tensors[split]):
                raise FedjetsError(
                    f"text.domains: no document is of the {split} split, which the digest of its name decides;"
                    " give more documents, or smaller ones"
                )
        wanted: dict[tuple[str, int], Counter[Part]] = defaultdict(Counter)
        for (_, part), (split, domain, start, end) in self._slices.items():
            wanted[split, domain][part] += end - start
        for (split, domain), lengths in wanted.items():
            have = len(self._tensors[f"{split}.{domain}"])
            if lengths.total() > have:
                most = lengths.most_common(1)[0][0]
                raise FedjetsError(
                    f"text.domains: the {split} text of {self.domains[domain]} has {have} tokens, and its clients need"
                    f" {lengths.total()}; lower text.{most}-tokens, partition.clients or partition.unseen-clients, or"
                    " give more text"
                )

    @cached_property
    def _slices(self) -> dict[tuple[int, Part], tuple[str, int, int, int]]:
        """Split, domain, first token and the one after the last, of each part of each client: one after another."""
        text, partition = self._config.text, self._config.partition
        ends, slices = Counter[tuple[str, int]](), dict[tuple[int, Part], tuple[str, int, int, int]]()
        if self._config.text_elsewhere:
            return slices
        for client in range(partition.all_clients):
            domain = self.domain_of(client)
            scored = FEDERATED if partition.role_of(client) == VALIDATION else TEST
            parts: tuple[tuple[Part, str, int], ...] = (
                ("train", FEDERATED, text.train_tokens),
                ("val", FEDERATED, text.val_tokens),
                ("test", scored, text.test_tokens),
            )
            for part, split, length in parts:
                start = ends[split, domain]
                ends[split, domain] += length
                slices[client, part] = split, domain, start, start + length
        return slices

    def _stream(self, split: str, domain: int) -> Tensor:
        """Return int32 (n,), the documents of a split and domain one after another, in an order that the seed draws."""
        if (key := (split, domain)) not in self._streams:
            documents = self._tensors[f"{split}.{domain}"].tensor_split(self._tensors[f"{split}.{domain}.ends"][:-1])
            drawn = torch_generator(self._config.run.seed, f"order of {split} {self.domains[domain]}")
            order = torch.randperm(len(documents), generator=drawn)
            self._streams[key] = torch.cat([documents[position] for position in order.tolist()])
        return self._streams[key]


@lru_cache(maxsize=2)
def open_text(config: Config) -> TextSplit:
    """Return the text of the settings; what became of it as tokens is kept in the cache.

    Raises:
        FedjetsError: text is missing, damaged or too little.
    """
    tensors = _tokens(config)
    # With the tokeniser: another version of its package may learn other merges of the same text.
    digest = hashlib.sha256(bytes(tensors["digest"].tolist()) + tensors["tokeniser"].numpy().tobytes()).hexdigest()
    split = TextSplit(config.text_domains, len(tensors["lengths"]), digest, config, tensors)
    split.check()
    return split


def documents_of(config: Config, domain: str) -> Iterator[Document]:
    """Return the documents of a domain that have text, each text once.

    Raises:
        FedjetsError: they are missing or damaged.
    """
    files = _files(config, domain)
    if config.data.name == "text-folder":
        return different(read_files(files, config.data_dir / domain))
    return different(SOURCES[domain].read(files, config.text_domains))


def split_of(document: Document, all_public: bool = False) -> str:
    """Return which of :data:`SPLITS` a document is of."""
    tens, ones = divmod(number_of(document.name), 10)
    if ones < 5 or all_public:
        return PUBLIC if tens % 10 else HELD_OUT
    return FEDERATED if ones < 9 else TEST


def _files(config: Config, domain: str) -> list[Path]:
    if config.data.name == "text-folder":
        return list_files(config.data_dir, domain)
    if domain not in SOURCES:
        raise FedjetsError(f"text.domains: {domain!r}: no such domain; there are {', '.join(SOURCES)}")
    return files_of(domain, config.data_dir)


def _tokens(config: Config) -> dict[str, Tensor]:
    """Return all text as tokens, kept by the names, sizes and times of its files."""
    if config.data.name not in ("text", "text-folder"):
        raise FedjetsError(f"data.name = {config.data.name!r}: holds no text; set it to 'text' or 'text-folder'")
    files = [path for domain in config.text_domains for path in _files(config, domain)]
    whose = (config.text_domains, config.public_domains, config.text_elsewhere)
    return cached_tokens(config, files, (FORMAT, whose), lambda: _make(config))


def _make(config: Config) -> dict[str, Tensor]:
    """Return the splits of all domains as int32 tokens, what the tokens stand for, and the digest of the text."""
    splits: dict[str, list[tuple[int, str]]] = {PUBLIC: [], HELD_OUT: []}
    hasher, characters = hashlib.sha256(), 0
    for position, domain in enumerate(config.text_domains):
        splits |= {f"{split}.{position}": [] for split in (FEDERATED, TEST)}
        for document in documents_of(config, domain):
            split, whole = split_of(document, config.text_elsewhere), ended(document)
            hasher.update(repr((domain, document.name, len(whole))).encode() + whole.encode())
            mixed = split in (PUBLIC, HELD_OUT)
            if mixed and domain not in config.public_domains:
                continue
            splits[split if mixed else f"{split}.{position}"].append((number_of(document.name), whole))
            characters += len(whole)
            if characters > MAX_CHARACTERS:
                raise FedjetsError(f"text.domains: more than {MAX_CHARACTERS} characters; give fewer or smaller ones")
    log.info("%.1f M characters of text become tokens; they are kept", characters / 1e6)
    # By the digests of their names, public documents of all domains mix.
    texts = {split: [text for _, text in sorted(found)] for split, found in splits.items()}
    tokens = tokens_for(config, texts[PUBLIC])
    tensors = kept_of(tokens, hasher.digest())
    for split, found in texts.items():
        encoded = tokens.encode(found)
        tensors[split] = torch.cat([torch.empty(0, dtype=torch.int32), *encoded])
        tensors[f"{split}.ends"] = torch.tensor([len(one) for one in encoded], dtype=torch.int64).cumsum(0)
    return tensors
