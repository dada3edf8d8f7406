"""Text as tokens: who holds which, and that nothing is lost or held twice."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data import text as text_module
from fedjets_flwr.data import text_sources
from fedjets_flwr.data.datasets import load_dataset
from fedjets_flwr.data.text import FEDERATED, HELD_OUT, PUBLIC, TEST, TextSplit, documents_of, open_text, split_of
from fedjets_flwr.data.text_sources import Document
from fedjets_flwr.data.text_tokens import learn_pairs
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.kept import digest_of
from fedjets_flwr.models.pretraining import cached_path
from fedjets_flwr.names import VALIDATION, Part

Make = Callable[..., Config]
PARTS: tuple[Part, ...] = ("train", "val", "test")
CLIENTS = range(11)
SMALL: dict[str, Scalar] = {
    "text.vocabulary": 400, "text.train-tokens": 500, "text.val-tokens": 100, "text.test-tokens": 100,
    "partition.clients": 6, "partition.unseen-clients": 3, "partition.validation-clients": 2, "cohort.normals": 1,
}  # fmt: skip

PAIRS: dict[str, Scalar] = {
    "text__tokens": "bpe", "text__train_tokens": 100, "text__val_tokens": 50, "text__test_tokens": 50,
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Settings for a few modules of Python's library and their docstrings, with clients of all roles."""
    folder = tmp_path_factory.mktemp("text")
    real, library = text_sources.library_folder(), folder / "library"
    for package in ("json", "logging", "urllib"):
        shutil.copytree(real / package, library / package, ignore=shutil.ignore_patterns("__pycache__"))

    def made(**given: Scalar) -> Config:
        own: dict[str, Scalar] = {
            "data.name": "text", "text.domains": "code,docstrings", "data.dir": str(folder / "data"),
            "run.cache-dir": str(folder / "cache"),
        }  # fmt: skip
        return Config.from_flat(SMALL | own | named(given))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_sources, "library_folder", lambda: library)
        yield made


def named(given: dict[str, Scalar]) -> dict[str, Scalar]:
    """Settings by names that Python takes: ``text__train_tokens``."""
    return {key.replace("__", ".").replace("_", "-"): value for key, value in given.items()}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Settings for two folders of documents whose every word is there once."""
    folder = tmp_path_factory.mktemp("own")
    for domain in ("a", "b"):
        for document in range(60):
            path = folder / "data" / domain / f"{document}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{domain}{document}.{word} " for word in range(50)))

    def made(**given: Scalar) -> Config:
        return Config.from_flat(
            SMALL
            | {"data.name": "text-folder", "text.domains": "a,b", "text.tokens": "bytes"}
            | {"data.dir": str(folder / "data"), "run.cache-dir": str(folder / "cache")}
            | named(given)
        )

    return made


def words(text: TextSplit, tokens: torch.Tensor) -> set[str]:
    """Whole words of tokens that may begin and end within one."""
    return set(text.decode(tokens).decode().split(" ")[1:-1])


def all_parts(text: TextSplit) -> dict[tuple[int, Part], set[str]]:
    return {(client, part): words(text, text.client(client, part).tokens) for client in CLIENTS for part in PARTS}


def test_clients_hold_the_domains_in_turn_and_what_the_settings_say(make: Make) -> None:
    text = open_text(make())
    assert text.domains == ("code", "docstrings")
    assert [text.client(client, "train").domain for client in CLIENTS] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert [len(text.client(3, part).tokens) for part in PARTS] == [500, 100, 100]
    assert text.client(3, "train").tokens.dtype == text.public.dtype == text.public_held_out.dtype == torch.int64
    assert text.vocabulary == 400 > int(text.public.max())


@pytest.mark.parametrize("tokens", ["bpe", "bytes"])
def test_tokens_stand_for_the_very_bytes_of_the_text(make: Make, tokens: str) -> None:
    config = make(text__tokens=tokens)
    text = open_text(config)
    for client in CLIENTS:
        part = text.client(client, "train")
        assert len(text.decode(part.tokens)) == part.num_bytes
    whole = b"".join(text.decode(stream) for stream in (text.public, text.public_held_out))
    public = [d.text for name in text.domains for d in documents_of(config, name) if split_of(d) in (PUBLIC, HELD_OUT)]
    ended = [(words if words.endswith("\n") else words + "\n").encode() for words in public]
    assert len(whole) == sum(map(len, ended))
    assert all(words in whole for words in ended)


def test_pairs_make_text_shorter(make: Make) -> None:
    pairs, plain = open_text(make()), open_text(make(text__tokens="bytes"))
    assert len(pairs.public) < 0.6 * len(plain.public)


@settings(max_examples=20)
@given(train=some.integers(1, 600), val=some.integers(1, 200), scored=some.integers(1, 200), seed=some.integers(0, 9))
def test_no_word_is_held_twice(own: Make, train: int, val: int, scored: int, seed: int) -> None:
    sizes = {"text__train_tokens": train, "text__val_tokens": val, "text__test_tokens": scored}
    text = open_text(own(run__seed=seed, **sizes))
    held = [*all_parts(text).values(), words(text, text.public), words(text, text.public_held_out)]
    for one, other in combinations(held, 2):
        assert not one & other


def test_each_split_is_of_documents_of_its_own(own: Make) -> None:
    config = own()
    text = open_text(config)
    split_by_document = {d.text.split(".")[0]: split_of(d) for name in "ab" for d in documents_of(config, name)}

    def splits(held: set[str]) -> set[str]:
        return {split_by_document[word.strip().split(".")[0]] for word in held}

    assert splits(words(text, text.public)) == {PUBLIC}
    assert splits(words(text, text.public_held_out)) == {HELD_OUT}
    for (client, part), held in all_parts(text).items():
        scores_the_unseen = part == "test" and config.partition.role_of(client) != VALIDATION
        assert splits(held) == {TEST if scores_the_unseen else FEDERATED}
        assert {word.strip()[0] for word in held} == {text.domains[text.client(client, part).domain]}


@pytest.mark.parametrize(
    ("name", "split"),
    [("l", PUBLIC), ("j", PUBLIC), ("m", HELD_OUT), ("b", FEDERATED), ("k", FEDERATED), ("a", TEST), ("h", TEST)],
)
def test_the_split_of_a_document_is_by_the_digest_of_its_name(name: str, split: str) -> None:
    """Last two digits of the SHA-256 as a number: l 60, j 51, m 02, b 65, k 06, a 99, h 39."""
    assert split_of(Document(name, "any text")) == split


def test_more_clients_leave_those_that_there_were_as_they_are(own: Make) -> None:
    fewer, more = open_text(own()), open_text(own(partition__unseen_clients=5))
    for client in range(6 + 3):
        for part in PARTS:
            assert torch.equal(fewer.client(client, part).tokens, more.client(client, part).tokens)


def test_the_seed_deals_clients_text_and_not_the_public_text(own: Make) -> None:
    one, other = open_text(own()), open_text(own(run__seed=2))
    assert torch.equal(one.public, other.public)
    assert torch.equal(one.public_held_out, other.public_held_out)
    assert all(not torch.equal(one.client(0, part).tokens, other.client(0, part).tokens) for part in PARTS)
    assert one.digest == other.digest


def shown(text: TextSplit) -> list[str]:
    """Digests of the text and of all its tokens."""
    clients = [text.client(client, part).tokens for client in CLIENTS for part in PARTS]
    tensors = {str(number): tokens for number, tokens in enumerate([text.public, text.public_held_out, *clients])}
    return [text.digest, digest_of(tensors)]


OTHER_PROCESS = """
import json, sys
from fedjets_flwr.config.schema import Config
from tests.data.test_text import open_text, shown
plain, pairs = (Config.from_flat(flat) for flat in json.loads(sys.argv[1]))
open_text(plain)
assert "tokenizers" not in sys.modules  # only who wants pairs pays for them
print(json.dumps(shown(open_text(pairs))))
"""


def test_every_process_makes_the_same_of_the_same_text(own: Make, tmp_path: Path) -> None:
    """Also with other threads and another order of sets."""
    settings = [own(run__cache_dir=str(tmp_path), **more).flat() for more in ({}, PAIRS)]
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, json.dumps(settings)], capture_output=True, text=True, check=False,
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == shown(open_text(own(**PAIRS)))


def test_the_digest_is_of_the_text_and_not_of_its_place(own: Make, tmp_path: Path) -> None:
    config = own(**PAIRS)
    shutil.copytree(config.data_dir, tmp_path / "data")
    moved = own(**PAIRS, data__dir=str(tmp_path / "data"))
    before = open_text(config)
    assert open_text(moved).digest == before.digest
    open_text.cache_clear()  # another process

    document = next(d for d in documents_of(moved, "b") if split_of(d) == TEST)
    (tmp_path / "data" / "b" / document.name).write_text("z" + document.text)
    after = open_text(moved)
    assert after.digest != before.digest
    assert torch.equal(after.public, before.public)  # pairs are learnt from public text alone
    open_text.cache_clear()

    (tmp_path / "data" / "b" / document.name).rename(tmp_path / "data" / "b" / "other.txt")
    assert open_text(moved).digest not in (before.digest, after.digest)


def test_the_digest_tells_other_pairs_of_the_same_text(
    own: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of the tokeniser's package may learn them: a run over both machines would mean nothing."""
    here = open_text(own(run__cache_dir=str(tmp_path / "here"), **PAIRS))
    monkeypatch.setattr("fedjets_flwr.data.text_cache.learn_pairs", lambda public, size: learn_pairs(public, 290))
    there = open_text(own(run__cache_dir=str(tmp_path / "there"), **PAIRS))
    assert there.tokeniser != here.tokeniser
    assert there.digest != here.digest


def test_what_became_of_text_is_kept_until_a_file_changes(
    own: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own(run__cache_dir=str(tmp_path))
    expected = open_text(config).public
    (kept,) = (tmp_path / "text").iterdir()
    open_text.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(text_module, "documents_of", None)
        assert torch.equal(open_text(config).public, expected)
    open_text.cache_clear()
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert torch.equal(open_text(config).public, expected)


def test_text_that_stands_twice_in_a_domain_counts_once(tmp_path: Path) -> None:
    for name in ("1.txt", "2.txt", "3.txt"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("same" if name != "2.txt" else " \n")
    config = Config.from_flat({"data.name": "text-folder", "text.domains": "a", "data.dir": str(tmp_path)})
    assert [document.name for document in documents_of(config, "a")] == ["1.txt"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text__train_tokens": 10**6}, "text.domains: the federated text of a has "),
        ({"text__train_tokens": 10**6}, "lower text.train-tokens, partition.clients"),
        ({"text__test_tokens": 10**6}, "lower text.test-tokens, partition.clients"),
        ({"text__val_tokens": 10**6}, "lower text.val-tokens, partition.clients"),
        ({"text__domains": "a,c"}, "text.domains: neither "),
        ({"text__domains": "a,../a"}, "text.domains: '../a' is no plain name"),
        ({"text__domains": "a,a"}, "text.domains = 'a,a': give one or more different ones"),
        ({"text__domains": " , "}, "text.domains = ' , ': give one or more different ones"),
        ({"data__name": "text"}, "text.domains: 'a': no such domain; there are code, docstrings, "),
        ({"data__name": "digits"}, "data.name = 'digits': holds no text"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_setting(own: Make, given: dict[str, Scalar], said: str) -> None:
    with pytest.raises(FedjetsError) as caught:
        open_text(own(**given))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_documents_for_a_public_part_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "l").with_suffix(".txt").write_text("one document alone")
    given: dict[str, Scalar] = {"data.name": "text-folder", "text.domains": "a", "data.dir": str(tmp_path)}
    with pytest.raises(FedjetsError, match="text.domains: no document is of the "):
        open_text(Config.from_flat(given | {"run.cache-dir": str(tmp_path / "cache")}))


def test_more_text_than_fits_is_refused(own: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 1000)
    with pytest.raises(FedjetsError, match="text.domains: more than 1000 characters"):
        open_text(own(run__cache_dir=str(tmp_path)))


def test_text_is_no_images() -> None:
    with pytest.raises(FedjetsError, match="data.name = 'text': holds no images"):
        load_dataset("text", Path("anywhere"), download=False)


def test_public_text_may_be_of_some_domains_and_clients_hold_all(own: Make) -> None:
    both, one = open_text(own()), open_text(own(text__public_domains="a"))
    for stream in (one.public, one.public_held_out):
        assert b"a" in one.decode(stream)
        assert b"b" not in one.decode(stream)
    assert b"b" in both.decode(both.public)
    assert {one.decode(one.client(client, "test").tokens)[:1] for client in (0, 1)} == {b"a", b"b"}
    assert one.digest == both.digest
    assert cached_path(own()) != cached_path(own(text__public_domains="a"))


def test_a_public_domain_that_is_none_is_refused(own: Make) -> None:
    with pytest.raises(FedjetsError, match="text.public-domains = 'a,c': give some of text.domains = 'a,b'"):
        own(text__public_domains="a,c")
