"""An audit log shows what was done to it."""

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.audit import FIRST, append, head_of, verify
from tests.support.personal import call

WRITTEN = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log of some lines."""
    folder = tmp_path_factory.mktemp("audit")
    write(folder / "audit.jsonl", WRITTEN)
    return folder


def write(path: Path, count: int) -> None:
    for number in range(count):
        append(path, "exchange", {"round": number, "failed": {"3": "no disk"}}, durable=True)


def changed(folder: Path, data: bytes) -> Path:
    """Return a copy of the log with other bytes; its newest hash is still beside it."""
    path = folder / "changed.jsonl"
    path.write_bytes(data)
    head_of(path).write_text(head_of(folder / "audit.jsonl").read_text())
    return path


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "audit.jsonl").read_bytes().splitlines(keepends=True)


def test_a_log_that_nobody_touched_is_whole(folder: Path) -> None:
    found = verify(folder / "audit.jsonl")
    assert (found.lines, found.torn) == (WRITTEN, ())
    assert found.head == head_of(folder / "audit.jsonl").read_text().strip() != FIRST
    assert (folder / "audit.jsonl").stat().st_mode & 0o777 == 0o600


@settings(max_examples=80, deadline=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_byte_that_was_changed_is_found(folder: Path, at: int, byte: int) -> None:
    data = bytearray((folder / "audit.jsonl").read_bytes())
    at %= len(data) - 1  # the last line's end is no part of it
    if data[at] == byte:
        return
    data[at] = byte
    with pytest.raises(FedjetsError, match="line [0-9]+ "):
        verify(changed(folder, bytes(data)))


@given(order=st.lists(st.integers(0, WRITTEN - 1), max_size=WRITTEN + 2))
@settings(max_examples=80, deadline=None)
def test_lines_that_are_cut_out_moved_or_repeated_are_found(folder: Path, order: list[int]) -> None:
    if order == list(range(WRITTEN)):
        return
    lines = lines_of(folder)
    with pytest.raises(FedjetsError, match="line [0-9]+ "):
        verify(changed(folder, b"".join(lines[number] for number in order)))


@given(size=st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_an_end_that_is_cut_off_is_found(folder: Path, size: int) -> None:
    data = (folder / "audit.jsonl").read_bytes()
    with pytest.raises(FedjetsError, match="is not the end"):
        verify(changed(folder, data[: size % (len(data) - 1)]))


def test_the_first_line_that_was_changed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_of(folder)
    lines[2] = lines[2].replace(b"no disk", b"no dish")
    with pytest.raises(FedjetsError, match="line 4 does not follow from what is before it"):
        verify(changed(folder, b"".join(lines)))
    assert call(monkeypatch, "audit", "verify", folder / "changed.jsonl") == 1
    assert call(monkeypatch, "audit", "verify", folder / "audit.jsonl") == 0


def test_a_log_without_its_newest_hash_needs_one_that_was_noted(folder: Path) -> None:
    path = changed(folder, b"".join(lines_of(folder)))
    noted = verify(path).head
    head_of(path).unlink()
    with pytest.raises(FedjetsError, match="--head"):
        verify(path)
    assert verify(path, noted).lines == WRITTEN


@pytest.mark.parametrize(
    "torn", ['{"before": "', '{"before": "HEAD", "what": "exch', "\0\0\0", '{"before": "HEAD"\n{"bef', ""]
)
def test_a_line_that_a_crash_cut_off_is_told_and_the_log_goes_on(
    tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    with path.open("ab") as file:
        file.write(torn.replace("HEAD", verify(path).head).encode())
    write(path, 2)
    found, broken = verify(path), torn.count("\n") + 1 if torn else 0
    assert (found.lines, found.torn) == (4, tuple(range(3, 3 + broken)))
    assert caplog.text.count("cut off in writing") == (1 if torn else 0)


@pytest.mark.parametrize("alien", [b"nonsense", b"[]", b'{"before": "' + 64 * b"0" + b'", "what": "exch', b'{"x": 1}'])
def test_a_line_that_no_log_begins_is_found(folder: Path, alien: bytes) -> None:
    lines = lines_of(folder)
    with pytest.raises(FedjetsError, match="line 4 is none that a log begins: something was put in"):
        verify(changed(folder, b"".join([*lines[:3], alien + b"\n", *lines[3:]])))


def test_a_line_without_its_end_is_still_one(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    write(path, 1)
    assert (verify(path).lines, verify(path).torn) == (3, ())


def test_processes_that_write_at_once_break_no_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(tmp_path / "audit.jsonl", 40)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert verify(tmp_path / "audit.jsonl").lines == 120
