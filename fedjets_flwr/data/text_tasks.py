"""Text to be written for a text, as tokens: the public part, and what each client holds, all of one task.

A sample is one row of tokens: an input, a token after which the target begins, the target, and a token that ends it.
Names decide splits as in :mod:`fedjets_flwr.data.text`; a pair whose input an earlier one of its task has is left out.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text import FEDERATED, HELD_OUT, PUBLIC, TEST, split_of
from fedjets_flwr.data.text_cache import cached_tokens, kept_of, tokens_for
from fedjets_flwr.data.text_pairs import PAIRS, Pair, pair_file, read_pairs
from fedjets_flwr.data.text_sources import MAX_CHARACTERS, Document, files_of
from fedjets_flwr.data.text_tokens import NOTHING, Asked, pieces_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import VALIDATION, Part
from fedjets_flwr.seeds import numpy_generator, torch_generator

log = logging.getLogger("flwr")
FORMAT = 2
"""Of what is kept; another number has all made anew."""
SKEWED = "dirichlet"
"""The partition in which clients differ in how often targets occur."""


@dataclass(frozen=True)
class Frame:
    """How a pair becomes a row.

    Attributes:
        context: tokens that a model sees at once, T.
        most: tokens of a target at most.
        begin: the token after an input.
        end: the token after a target.
    """

    context: int
    most: int
    begin: int
    end: int

    def row(self, given: Tensor, target: Tensor) -> Tensor:
        """Return a pair as one row, of T + 1 tokens at most.

        A target that is too long loses its end, and an input its middle: what stands first and what stands last say
        most, and how much is left does not depend on the target.
        """
        room = self.context - 1 - self.most
        head, tail = (room + 1) // 2, room // 2
        cut = given if len(given) <= room else torch.cat([given[:head], given[len(given) - tail :]])
        return torch.cat([cut, torch.tensor([self.begin]), target[: self.most], torch.tensor([self.end])])

    def targets_of(self, row: Tensor) -> Tensor:
        """Return a row with ``NOTHING`` in place of what is no part of the target or its end."""
        begin = int((row == self.begin).nonzero())
        return torch.cat([torch.full((begin + 1,), NOTHING), row[begin + 1 :]])

    def windows(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what a model reads of rows, and what it is to tell after each token, int64 (n, T) both."""
        whole, targets = (self._padded(found) for found in (rows, [self.targets_of(row) for row in rows]))
        return whole[:, :-1].masked_fill(whole[:, 1:] == NOTHING, NOTHING), targets[:, 1:]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Return rows as one table (n, T + 1)."""
        padded = pad_sequence(list(rows), batch_first=True, padding_value=NOTHING)
        return F.pad(padded, (0, self.context + 1 - padded.shape[1]), value=NOTHING)


@dataclass(frozen=True)
class TaskPart:
    """A client's samples.

    Attributes:
        read: tokens, int64 (n, T), ``NOTHING`` behind the last.
        targets: those to be told after each, (n, T), ``NOTHING`` where none is.
        num_bytes: of the text of all targets.
        domain: position in :attr:`TaskSplit.domains`.
    """

    read: Tensor
    targets: Tensor
    num_bytes: int
    domain: int


@dataclass(frozen=True, eq=False)
class TaskSplit:
    """Who holds which pairs.

    Attributes:
        domains: names of the tasks.
        scores: how each is scored.
        digest: SHA-256 over the tasks' names, their pairs, the tokens, and how long a target may be.
    """

    domains: tuple[str, ...]
    scores: tuple[str, ...]
    digest: str
    _config: Config = field(repr=False)
    _tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, of which the last two stand for no text."""
        return len(self._tensors["lengths"]) + 2

    @property
    def tokeniser(self) -> str:
        """What makes the same tokens of text elsewhere (``Tokens.told``); two more begin and end a target."""
        return self._tensors["tokeniser"].numpy().tobytes().decode()

    @property
    def frame(self) -> Frame:
        """How a pair becomes a row."""
        context, most = self._config.language_model.context, self._config.text.target_tokens
        return Frame(context, most, self.vocabulary - 2, self.vocabulary - 1)

    @cached_property
    def _public_rows(self) -> list[Tensor]:
        return self._rows(PUBLIC, range(self._count(PUBLIC)))

    @cached_property
    def public(self) -> Tensor:
        """What anybody may train on: int64 (n,), pairs of all tasks mixed, each as clients have it."""
        return torch.cat(self._public_rows)

    @cached_property
    def public_asked(self) -> Asked:
        """Targets, and where pairs begin: a model meets inputs where it will meet those of clients, at the start."""
        lengths = torch.tensor([0, *(len(row) for row in self._public_rows[:-1])])
        return Asked(lengths.cumsum(0), torch.cat([self.frame.targets_of(row) for row in self._public_rows]))

    @cached_property
    def public_held_out(self) -> Tensor:
        """Public pairs that no training sees: int64 (n,)."""
        return torch.cat(self._rows(HELD_OUT, range(self._count(HELD_OUT))))

    def client(self, client: int, part: Part) -> TaskPart:
        """Return a part of a client's pairs, which no other part and no other client has (:meth:`TextSplit.client`)."""
        key, places = self._held[client, part]
        read, targets = self.frame.windows(self._rows(key, places.tolist()))
        lengths = torch.cat([self._tensors["lengths"], torch.zeros(2, dtype=torch.int64)])
        num_bytes = int(lengths[targets[targets != NOTHING]].sum())
        return TaskPart(read, targets, num_bytes, self._domain_of(client))

    def text(self, tokens: Tensor) -> str:
        """Return the text of tokens (n,) up to the one that ends it, a target's behind a blank.

        What is no UTF-8 becomes a question mark.
        """
        found = tokens.tolist()
        told = found[: found.index(self.frame.end)] if self.frame.end in found else found
        return b"".join(self._pieces[token] for token in told if token < self.frame.begin).decode(errors="replace")

    def check(self) -> None:
        """Check that there are enough pairs.

        Raises:
            FedjetsError: there are not.
        """
        for split in (PUBLIC, HELD_OUT):
            if not self._count(split):
                raise FedjetsError(
                    f"text.domains: no pair is of the {split} split, which the digest of its name decides; give more"
                )
        self.client(0, "train")  # deals to all

    def _domain_of(self, client: int) -> int:
        return self._config.domain_of(client)

    @cached_property
    def _pieces(self) -> list[bytes]:
        return pieces_of(self._tensors["pieces"], self._tensors["lengths"])

    def _count(self, key: str) -> int:
        return len(self._tensors[f"{key}.labels"])

    def _rows(self, key: str, places: Sequence[int]) -> list[Tensor]:
        """Return some pairs of a split as rows."""
        inputs, targets = (_picked(self._tensors, f"{key}.{name}", places) for name in ("inputs", "targets"))
        return [self.frame.row(*pair) for pair in zip(inputs, targets, strict=True)]

    @cached_property
    def _held(self) -> dict[tuple[int, Part], tuple[str, Tensor]]:
        """The split that each part of each client is of, and the places of its pairs there."""
        text, partition = self._config.text, self._config.partition
        found: dict[tuple[int, Part], tuple[str, Tensor]] = {}
        for domain in range(len(self.domains)):
            clients = [c for c in range(partition.all_clients) if self._domain_of(c) == domain]
            validation = [c for c in clients if partition.role_of(c) == VALIDATION]
            sizes = [text.train_pairs + text.val_pairs + text.test_pairs * (c in validation) for c in clients]
            for client, places in zip(clients, self._deal(FEDERATED, domain, sizes), strict=True):
                train, val, rest = places.tensor_split([text.train_pairs, text.train_pairs + text.val_pairs])
                for part, held in (("train", train), ("val", val), ("test", rest)):
                    found[client, part] = f"{FEDERATED}.{domain}", held  # type: ignore[index]
            scored = [c for c in clients if c not in validation]
            for client, places in zip(scored, self._deal(TEST, domain, [text.test_pairs] * len(scored)), strict=True):
                found[client, "test"] = f"{TEST}.{domain}", places
        return found

    def _deal(self, split: str, domain: int, sizes: Sequence[int]) -> list[Tensor]:
        """Return the places of so many pairs for each client of a domain.

        In an order of documents that the seed draws; where clients differ by label, each draws targets by shares of
        its own, which do not hold for what scores it.
        """
        key, seed, name = f"{split}.{domain}", self._config.run.seed, self.domains[domain]
        documents, labels = self._tensors[f"{key}.documents"], self._tensors[f"{key}.labels"]
        if sum(sizes) > self._count(key):
            least = {FEDERATED: "text.train-pairs, text.val-pairs", TEST: "text.test-pairs"}[split]
            raise FedjetsError(
                f"text.domains: the {split} part of {name} has {self._count(key)} pairs, and its clients need"
                f" {sum(sizes)}; lower {least}, partition.clients or partition.unseen-clients, or give more"
            )
        if not sum(sizes):  # there may be no document
            return [torch.empty(0, dtype=torch.int64) for _ in sizes]
        drawn = torch.randperm(int(documents.max()) + 1, generator=torch_generator(seed, f"order of {key} {name}"))
        order = drawn[documents].argsort(stable=True)
        by_label = split == FEDERATED and self.scores[domain] == "accuracy"
        if not by_label or self._config.partition.name != SKEWED:
            return list(order[: sum(sizes)].split(list(sizes)))
        return [
            order[places]
            for places in deal_by_label(
                labels[order], sizes, self._config.partition.alpha, numpy_generator(seed, f"labels of {name}")
            )
        ]


def deal_by_label(labels: Tensor, sizes: Sequence[int], alpha: float, rng: np.random.Generator) -> list[Tensor]:
    """Return places of samples for each client, whose shares of the labels are drawn from Dir(alpha).

    Clients draw in turn, each sample's label among those of which some are left, and take the first that is left.

    Args:
        labels: of n samples, (n,).
        sizes: samples of each client, n at most together.
        alpha: concentration; a small one gives each client few labels.
        rng: of the draws.
    """
    left = [torch.nonzero(labels == label)[:, 0].tolist()[::-1] for label in labels.unique()]
    counts = np.array([len(places) for places in left])
    dealt = []
    for size in sizes:
        shares, taken = rng.dirichlet([alpha] * len(left)), []
        for _ in range(size):
            wanted = shares * (counts > 0)
            chances = wanted if wanted.sum() > 0 else (counts > 0).astype(float)
            label = rng.choice(len(left), p=chances / chances.sum())
            taken.append(left[label].pop())
            counts[label] -= 1
        dealt.append(torch.tensor(taken, dtype=torch.int64))
    return dealt


@lru_cache(maxsize=2)
def open_tasks(config: Config) -> TaskSplit:
    """Return the pairs of the settings; what became of them as tokens is kept in the cache.

    Raises:
        FedjetsError: they are missing, damaged or too few.
    """
    tensors = _tokens(config)
    hasher = hashlib.sha256(bytes(tensors["digest"].tolist()) + tensors["tokeniser"].numpy().tobytes())
    hasher.update(repr(config.text.target_tokens).encode())
    split = TaskSplit(config.text_domains, scores_of(config), hasher.hexdigest(), config, tensors)
    split.check()
    return split


def scores_of(config: Config) -> tuple[str, ...]:
    """Return how each task is scored.

    Raises:
        FedjetsError: a domain has no task, or ``text.scores`` are not as many.
    """
    if config.data.name == "task-folder":
        if len(config.text_scores) != len(config.text_domains):
            raise FedjetsError(
                f"text.scores = {config.text.scores!r}: give one for each of text.domains = {config.text.domains!r}"
            )
        return config.text_scores
    for domain in config.text_domains:
        if domain not in PAIRS:
            raise FedjetsError(f"text.domains: {domain!r} has no task; set it to some of {','.join(PAIRS)}")
    return tuple(PAIRS[domain].score for domain in config.text_domains)


def _files(config: Config, domain: str) -> list[Path]:
    own = config.data.name == "task-folder"
    return [pair_file(config.data_dir, domain)] if own else files_of(domain, config.data_dir)


def _pairs_of(config: Config, domain: str) -> Iterator[Pair]:
    """Yield the pairs of a domain, each input once."""
    files, seen = _files(config, domain), set[bytes]()
    found = read_pairs(files[0]) if config.data.name == "task-folder" else PAIRS[domain].read(files)
    for pair in found:
        digest = hashlib.sha256(pair.input.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield pair


def _tokens(config: Config) -> dict[str, Tensor]:
    """Return all pairs as tokens, kept by the names, sizes and times of their files."""
    scores_of(config)
    files = [path for domain in config.text_domains for path in _files(config, domain)]
    return cached_tokens(config, files, (FORMAT, config.text_domains), lambda: _make(config))


def _make(config: Config) -> dict[str, Tensor]:
    """Return the splits of all domains as tokens, what the tokens stand for, and the digest of the pairs."""
    splits: dict[str, list[Pair]] = {PUBLIC: [], HELD_OUT: []}
    hasher, characters = hashlib.sha256(), 0
    for position, domain in enumerate(config.text_domains):
        splits |= {f"{split}.{position}": [] for split in (FEDERATED, TEST)}
        for pair in _pairs_of(config, domain):
            split = split_of(Document(pair.name, pair.input))
            hasher.update(repr((domain, pair.name, pair.input, pair.target)).encode(errors="surrogateescape"))
            splits[split if split in (PUBLIC, HELD_OUT) else f"{split}.{position}"].append(pair)
            characters += len(pair.input) + len(pair.target)
            if characters > MAX_CHARACTERS:
                raise FedjetsError(f"text.domains: more than {MAX_CHARACTERS} characters; give fewer or smaller pairs")
    log.info("%.1f M characters of text become tokens; they are kept", characters / 1e6)
    for split in (PUBLIC, HELD_OUT):  # by the digests of their inputs, pairs of all domains mix
        splits[split].sort(key=lambda pair: hashlib.sha256(pair.input.encode()).digest())
    public = [text for pair in splits[PUBLIC] for text in (pair.input, _behind_a_blank(pair.target))]
    tokens = tokens_for(config, public)
    tensors = kept_of(tokens, hasher.digest())
    for split, found in splits.items():
        tensors |= _joined(f"{split}.inputs", tokens.encode([pair.input for pair in found]))
        tensors |= _joined(f"{split}.targets", tokens.encode([_behind_a_blank(pair.target) for pair in found]))
        tensors[f"{split}.documents"] = _numbered([pair.name for pair in found])
        tensors[f"{split}.labels"] = _numbered([pair.target for pair in found])
    return tensors


def _behind_a_blank(target: str) -> str:
    """Return a target as running text has it: word pieces hold the blank before them, and a copy is of whole pieces."""
    return f" {target.strip()}"


def _numbered(texts: Sequence[str]) -> Tensor:
    """Return a number for each text, from 0 on, the same for the same text."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([numbers[text] for text in texts], dtype=torch.int64)


def _joined(name: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return rows of different lengths as two tensors: one after another, and where each ends."""
    ends = torch.tensor([len(row) for row in rows], dtype=torch.int64).cumsum(0)
    return {name: torch.cat([torch.empty(0, dtype=torch.int32), *rows]), f"{name}.ends": ends}


def _picked(tensors: Mapping[str, Tensor], name: str, places: Sequence[int]) -> list[Tensor]:
    """Return some of the rows of :func:`_joined`, int64."""
    bounds = [0, *tensors[f"{name}.ends"].tolist()]
    return [tensors[name][bounds[place] : bounds[place + 1]].long() for place in places]
