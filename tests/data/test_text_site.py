"""A site's own text: parts of documents of their own, up to so many tokens, kept until a file changes."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fedjets_flwr.data import text_site
from fedjets_flwr.data.text import TEST, split_of
from fedjets_flwr.data.text_site import SiteText, encode_site, open_site, part_of
from fedjets_flwr.data.text_sources import Document
from fedjets_flwr.data.text_tokens import as_bytes
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import PARTS

NAMES = [f"{number}.txt" for number in range(60)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty documents whose every byte says which it is of."""
    for number, name in enumerate(NAMES):
        (tmp_path / "own" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / name).write_text(chr(40 + number) * 30)
    return tmp_path / "own"


def documents_in(text: SiteText, part: str) -> set[int]:
    drawn = text.stream(10**6, torch.Generator().manual_seed(0), part)  # type: ignore[arg-type]
    return set((drawn[drawn != ord("\n")] - 40).tolist())


@pytest.mark.parametrize(("name", "part"), [("l", "train"), ("m", "train"), ("b", "train"), ("a", "test")])
def test_the_part_of_a_document_is_by_the_digest_of_its_name(name: str, part: str) -> None:
    """Last two digits of the SHA-256 as a number: l 60, m 02, b 65, a 99."""
    assert part_of(Document(name, "any text")) == part


@given(name=some.text(max_size=5))
def test_what_scores_a_client_elsewhere_scores_it_here(name: str) -> None:
    document = Document(name, "text")
    assert (part_of(document) == "test") == (split_of(document) == TEST)


def test_parts_are_of_documents_of_their_own_and_lose_none(folder: Path) -> None:
    held = [documents_in(encode_site(folder, as_bytes()), part) for part in PARTS]
    assert set().union(*held) == set(range(60))
    assert not any(one & other for one, other in combinations(held, 2))
    assert held == [{n for n, name in enumerate(NAMES) if part_of(Document(name, "")) == part} for part in PARTS]


def test_limits_cut_and_the_seed_decides_the_order(folder: Path) -> None:
    text = encode_site(folder, as_bytes())
    one, again, other = (text.stream(100, torch.Generator().manual_seed(seed), "train") for seed in (1, 1, 2))
    assert len(one) == 100
    assert one.dtype == torch.int64
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert text.num_bytes(one) == 100


def test_json_lines_are_as_good_as_files(folder: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"name": name, "text": (folder / name).read_text()}) for name in sorted(NAMES)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    one, other = (encode_site(place, as_bytes()).documents for place in (folder, tmp_path / "own.jsonl"))
    for part in PARTS:
        assert [t.tolist() for t in one[part]] == [t.tolist() for t in other[part]]


def test_tokens_are_kept_until_a_file_changes_and_nothing_older_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> SiteText:
        open_site.cache_clear()  # another process
        return open_site(folder, "", tmp_path / "cache")

    first = opened()
    wanted = encode_site(folder, as_bytes())
    for part in PARTS:
        assert [t.tolist() for t in first.documents[part]] == [t.tolist() for t in wanted.documents[part]]
    with monkeypatch.context() as patch:
        patch.setattr(text_site, "encode_site", None)
        assert documents_in(opened(), "val") == documents_in(first, "val")
    (folder / "new.txt").write_text("~" * 30)
    assert ord("~") - 40 in set().union(*(documents_in(opened(), part) for part in PARTS))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def test_what_is_no_text_of_a_site_is_one_line_that_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "letter.md").write_text("a")
    for place, said in (
        ("empty", "empty: no text in it"),
        ("blank.jsonl", "blank.jsonl: no text in it"),
        ("letter.md", "letter.md: neither a folder of .txt files nor such a file, nor one of JSON lines"),
        ("absent", "absent: neither a folder"),
    ):
        with pytest.raises(FedjetsError, match=said) as caught:
            encode_site(tmp_path / place, as_bytes())
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(text_site, "MAX_CHARACTERS", 100)
    with pytest.raises(FedjetsError, match="own: more than 100 characters"):
        encode_site(folder, as_bytes())


def test_a_broken_file_costs_itself_and_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = encode_site(folder, as_bytes())
    lost = next(number for number, name in enumerate(NAMES) if part_of(Document(name, "")) == "train")
    (folder / NAMES[lost]).write_bytes(b"caf\xe9")
    with caplog.at_level("WARNING", logger="flwr"):
        rest = encode_site(folder, as_bytes())
    assert documents_in(rest, "train") == documents_in(whole, "train") - {lost}
    assert f"1 files of text are left out, the first is {folder / NAMES[lost]}: not UTF-8" in caplog.text
    for name in NAMES:
        (folder / name).write_bytes(b"\xe9")
    with pytest.raises(FedjetsError, match="0.txt: not UTF-8"):
        encode_site(folder, as_bytes())


def test_a_part_without_a_document_is_told(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"name": "l", "text": "trains"}')
    text = encode_site(tmp_path / "l.jsonl", as_bytes())
    with pytest.raises(FedjetsError, match=r"l\.jsonl: no document is of the test part"):
        text.stream(10, torch.Generator(), "test")
