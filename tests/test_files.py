import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from fedjets_flwr.config.schema import Config
from fedjets_flwr.files import made_once, written
from fedjets_flwr.runs.checkpoint import RunLock


def test_a_file_is_replaced_in_one_step_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("one", "two"):
        with written(path, durable=True) as file:
            file.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with written(path) as file:
            file.write_text("half")
            raise OSError(28, "No space left")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_makes_a_file_and_another_waits_and_finds_it(tmp_path: Path) -> None:
    path, waits, said = tmp_path / "new" / "file", threading.Event(), list[str]()

    def look() -> None:
        with made_once(path, waits.set):
            said.append(path.read_text())

    other = threading.Thread(target=look)
    with made_once(path, lambda: pytest.fail("nobody else is there")):
        other.start()
        assert waits.wait(20)
        path.write_text("made")
    other.join(20)
    assert said == ["made"]
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_maker_that_fails_keeps_nobody(tmp_path: Path) -> None:
    def fail() -> None:
        with made_once(tmp_path / "file", lambda: None):
            raise OSError(28, "No space left")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert not list(tmp_path.iterdir())
    with made_once(tmp_path / "file", lambda: pytest.fail("nobody else is there")):
        pass


def test_where_a_disk_knows_no_locks_nobody_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network's disks: a run there must not wait for another that does not exist."""

    def unknown(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with made_once(tmp_path / "file", lambda: pytest.fail("nobody else is there")):
        pass
    config = Config.from_flat({"run.output-dir": str(tmp_path), "run.name": "run"})
    config.run_dir.mkdir()
    with RunLock(config, seconds=0):
        pass
