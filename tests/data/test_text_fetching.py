"""Packages of text, by programs that stand in for apt's and by pip itself, offline."""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from fedjets_flwr.data import text_fetching
from fedjets_flwr.data.text_fetching import fetch
from fedjets_flwr.data.text_sources import Package
from fedjets_flwr.errors import FedjetsError

APT = Package("apt", "some-text")
DOWNLOAD = '[ "$1 $2" = "download some-text" ] && echo packed > some-text_1_all.deb'
UNPACK = '[ "$1" = -x ] && mkdir -p "$3/usr" && cp "$2" "$3/usr/text"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that come first on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    stand_in(folder, "apt-get", DOWNLOAD)
    stand_in(folder, "dpkg-deb", UNPACK)
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def wheel(folder: Path, name: str = "some_text", **files: str) -> str:
    """Write a wheel for pip to find; return its digest."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(f"{name}/{inside}.txt", text)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-text\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_debian_package_is_unpacked_in_the_place_of_an_older_one(programs: Path, tmp_path: Path) -> None:
    data = tmp_path / "new" / "data"
    assert fetch(APT, data) == len("packed\n")
    (data / "some-text" / "old").touch()
    fetch(APT, data)
    assert [path.relative_to(data).as_posix() for path in sorted(data.rglob("*"))] == [
        "some-text", "some-text/usr", "some-text/usr/text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "script", "said"),
    [
        ("apt-get", "echo 'W: old' >&2; echo 'E: Unable to locate \033[1m package' >&2; exit 100",
         r"apt-get: E: Unable to locate \\x1b\[1m package"),
        ("apt-get", "exit 100", "apt-get: exit code 100"),
        ("apt-get", "exit 0", "some-text: expected one file, and 0 came"),
        ("dpkg-deb", "exit 2", "dpkg-deb: exit code 2"),
    ],
)  # fmt: skip
def test_what_fails_says_why_and_leaves_what_was_there(
    name: str, script: str, said: str, programs: Path, tmp_path: Path
) -> None:
    fetch(APT, tmp_path / "data")
    stand_in(programs, name, script)
    with pytest.raises(FedjetsError, match=f"^{said}$"):
        fetch(APT, tmp_path / "data")
    assert (tmp_path / "data" / "some-text" / "usr" / "text").read_text() == "packed\n"
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_without_apt_one_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FedjetsError, match="^there is no apt-get here$"):
        fetch(APT, tmp_path / "data")


def test_a_program_that_hangs_is_left(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(programs, "apt-get", "exec sleep 60")
    monkeypatch.setattr(text_fetching, "SECONDS", 0.2)
    with pytest.raises(FedjetsError, match="^apt-get took more than 0.2 seconds$"):
        fetch(APT, tmp_path / "data")


def test_a_wheel_is_unpacked_if_it_is_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = wheel(tmp_path, text="once")
    offline(monkeypatch, tmp_path)
    assert fetch(Package("pip", "some-text", "1.0", digest), tmp_path / "data") > 0
    assert (tmp_path / "data" / "some-text" / "some_text" / "text.txt").read_text() == "once"

    with pytest.raises(FedjetsError, match=f"^some-text==1.0 is not the file that it was .its SHA-256 is {digest}.$"):
        fetch(Package("pip", "some-text", "1.0", "0" * 64), tmp_path / "data")

    monkeypatch.setattr(text_fetching, "MAX_BYTES", 10)
    with pytest.raises(FedjetsError, match="^some-text==1.0 has more than 10 bytes unpacked$"):
        fetch(Package("pip", "some-text", "1.0", digest), tmp_path / "data")


def test_nothing_of_a_source_archive_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "setup.py"
    script.write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    with tarfile.open(tmp_path / "some-text-1.0.tar.gz", "w:gz") as archive:
        archive.add(script, "some-text-1.0/setup.py")
    offline(monkeypatch, tmp_path)
    with pytest.raises(FedjetsError, match="^pip: ERROR: No matching distribution found for some-text==1.0"):
        fetch(Package("pip", "some-text", "1.0", "0" * 64), tmp_path / "data")
    assert not (tmp_path / "was-run").exists()
    assert not any((tmp_path / "data").iterdir())
