"""Text of one's own, as folders or JSON lines."""

from pathlib import Path

import pytest

from fedjets_flwr.data.text_folder import list_files, read_files
from fedjets_flwr.errors import FedjetsError


def read(folder: Path, domain: str) -> list[tuple[str, str]]:
    return [(found.name, found.text) for found in read_files(list_files(folder, domain), folder / domain)]


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_each_text_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    write(tmp_path / "mail" / "b.txt", "two")
    write(tmp_path / "mail" / "a" / "c.txt", "öne\r\n")
    for other in ("mail/.hidden/d.txt", "mail/.e.txt", "mail/f.md", "other/g.txt"):
        write(tmp_path / other, "no")
    (tmp_path / "mail" / "folder.txt").mkdir()
    assert read(tmp_path, "mail") == [("a/c.txt", "öne\r\n"), ("b.txt", "two")]


def test_each_line_of_json_lines_is_a_document(tmp_path: Path) -> None:
    write(tmp_path / "mail.jsonl", '{"text": "one\\u2028"}\n\n{"name": "n", "text": "two", "more": 1}')
    assert read(tmp_path, "mail") == [("1", "one\u2028"), ("n", "two")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "mail.jsonl, line 2: not JSON: "),
        ("[" * 100_000, "mail.jsonl, line 2: nested too deep"),
        ("[]", "mail.jsonl, line 2: expected an object like "),
        ('{"name": "a"}', "mail.jsonl, line 2: expected an object like "),
        ('{"text": 1}', "mail.jsonl, line 2: expected an object like "),
        ('{"name": 1, "text": "a"}', "mail.jsonl, line 2: expected an object like "),
        ('{"text": "\\ud800"}', "mail.jsonl, line 2: not JSON: "),
    ],
)
def test_a_line_that_is_no_document_is_named(line: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "mail.jsonl", '{"text": "one"}\n' + line)
    with pytest.raises(FedjetsError) as caught:
        read(tmp_path, "mail")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mail" / "a.txt", "abcö".encode("latin-1"))
    with pytest.raises(FedjetsError, match="a.txt: not UTF-8 at byte 3; convert it"):
        read(tmp_path, "mail")


def test_a_domain_is_a_folder_or_a_file(tmp_path: Path) -> None:
    write(tmp_path / "empty" / "a.md", "")
    write(tmp_path / "both" / "a.txt", "a")
    write(tmp_path / "both.jsonl", "")
    for domain, said in (
        ("absent", "text.domains: neither .*absent/ nor .*absent.jsonl is there; data.dir"),
        ("empty", "empty: no text in it"),
        ("both", "both.jsonl: .*both is there, too"),
        ("../both", "text.domains: '../both' is no plain name of a folder"),
        ("..", "text.domains: '..' is no plain name of a folder"),
        (str(tmp_path / "both"), "text.domains: .* is no plain name of a folder"),
    ):
        with pytest.raises(FedjetsError, match=said):
            list_files(tmp_path, domain)
