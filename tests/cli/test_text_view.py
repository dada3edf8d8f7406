"""`fedjets text`: what can be had is fetched, and what cannot is told."""

import gzip
from pathlib import Path

import pytest

from fedjets_flwr.cli import text_view
from fedjets_flwr.data import text_sources
from fedjets_flwr.data.text_sources import Package
from fedjets_flwr.errors import FedjetsError
from tests.support.personal import call

JARGON = Path("usr/share/doc/jargon-text/jargon.txt.gz")
WANTED = "text.domains='code,slang,manual'"


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fetched, from where only the Jargon File is to be had."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "abc.py").write_text("print(1)\n")
    monkeypatch.setattr(text_sources, "library_folder", lambda: library)
    monkeypatch.setenv("COLUMNS", "100")
    found: list[str] = []

    def fetch(package: Package, folder: Path) -> int:
        if package.name != "jargon-text":
            raise FedjetsError("apt-get: E: Unable to locate package")
        found.append(package.name)
        path = folder / package.name / JARGON
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"   :abbrev: n.\n\n   Common abbreviation.\n"))
        return 2_500_000

    monkeypatch.setattr(text_view, "fetch", fetch)
    return found


def text(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> int:
    return call(monkeypatch, "text", "-c", f"data.dir={folder}", *more)


def test_what_can_be_had_is_fetched_once_and_the_rest_is_told(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text(monkeypatch, tmp_path, "-c", WANTED) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "code: here, 1 document, 0.00 M characters",
        "slang: jargon-text comes by apt …",
        "slang: 2.5 MB fetched, 1 document, 0.00 M characters; public domain",
        "manual: perl-doc comes by apt …",
        "manual: could not be had: apt-get: E: Unable to locate package",
    ]
    assert said.err == "error: text.domains: manual could not be had; without: -c \"text.domains='code,slang'\"\n"

    assert text(monkeypatch, tmp_path, "-c", "text.domains='code,slang'") == 0
    assert capsys.readouterr().out.splitlines()[1] == "slang: here, 1 document, 0.00 M characters"
    assert fetched == ["jargon-text"]

    (tmp_path / "jargon-text" / JARGON).write_text("damaged")
    assert text(monkeypatch, tmp_path, "-c", "text.domains='slang'") == 0
    assert fetched == ["jargon-text", "jargon-text"]


def test_where_nothing_can_be_had_the_domains_of_python_are_named(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text(monkeypatch, tmp_path, "-c", "text.domains='manual'") == 1
    assert "without: -c \"text.domains='code,docstrings'\"" in capsys.readouterr().err


def test_the_list_fetches_nothing_and_tells_sizes_and_licences(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text(monkeypatch, tmp_path, "--list") == 0
    said = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in said.splitlines() if len(cells := line.strip("│").split("│")) > 5}
    counts = {name.strip(): [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert counts["code"] == ["1", "0.00", "0.00", "0.00", "0.00", "Python"]
    assert counts["manual"] == ["not here", "", "", "", "", "apt"]
    assert counts["scripture"][-1] == "pip"
    assert "manual: Perl's manual pages; GPL-1+ or Artistic" in said
    assert fetched == []


def test_own_text_is_counted_and_never_fetched(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail" / "a.txt").write_text("x" * 20_000)
    own = ["-c", "data.name=text-folder text.domains='mail,manual'"]
    assert text(monkeypatch, tmp_path, *own, "--list") == 0
    rows, _, told = capsys.readouterr().out.partition("manual: ")
    (row,) = [line for line in rows.splitlines() if "mail" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][:3] == ["mail", "1", "0.02"]
    assert told.startswith("text.domains: neither ")

    assert text(monkeypatch, tmp_path, *own) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first == "mail: here, 1 document, 0.02 M characters"
    assert second.startswith("manual: could not be had: text.domains: neither ")
    assert fetched == []
