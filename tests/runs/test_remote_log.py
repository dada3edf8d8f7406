"""What a ServerApp says in its log is what the launcher's folder holds."""

import json
import os
import time
from pathlib import Path

import pytest

from fedjets_flwr.config.schema import Config
from fedjets_flwr.runs.claim import BEFORE
from fedjets_flwr.runs.remote_log import MARK, Announcer, Mirror, without_announcements
from fedjets_flwr.runs.tracking import Tracker, publish, read_metrics


def record(server_round: int) -> dict[str, object]:
    return {"round": server_round, "loss": 0.5, "seconds": {"round": 1.0}}


def mirror(folder: Path, *command: str) -> Mirror:
    folder.mkdir(exist_ok=True)
    return Mirror(folder, command or ["true"], dict(os.environ), folder)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The log as Flower brings it: other lines between, a level and colours before."""
    lines = capsys.readouterr().out.splitlines(keepends=True)
    return "\x1b[92mINFO \x1b[0m:      first\n" + "".join(f"{line}ordinary line {{}}\n" for line in lines)


def a_run(folder: Path) -> Tracker:
    """A ServerApp that goes on after round 1."""
    tracker = Tracker(Config.from_flat({"run.output-dir": str(folder), "run.name": "run"}), Announcer())
    tracker.on_round(record(1), {})
    tracker.on_round(record(2), {})
    tracker.cut_back(1)
    tracker.on_round(record(2), {})
    tracker.write("summary.json", {"status": "completed"})
    return tracker


def test_the_launchers_folder_holds_what_the_servers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = a_run(tmp_path / "server").folder
    here = tmp_path / "here"
    mirror(here).read(said(capsys))
    assert read_metrics(here) == read_metrics(server) == [record(1), record(2)]
    names = {"config.json", "progress.json", "summary.json", "metrics.jsonl"}
    assert {path.name for path in here.iterdir()} == {path.name for path in server.iterdir()} == names
    for name in names:
        assert (here / name).read_text() == (server / name).read_text()


def test_a_log_that_is_read_again_or_in_pieces_adds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "server")
    log = said(capsys)
    here = mirror(tmp_path / "here")
    for end in (len(log) // 3, len(log) // 2, len(log), len(log)):
        here.read(log[:end])
    assert read_metrics(tmp_path / "here") == [record(1), record(2)]


def test_nobody_else_can_announce(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A client's error message may hold anything, but never the word."""
    a_run(tmp_path / "server")
    fake = json.dumps({"n": 99, "kind": "summary.json", "value": {"status": "hacked"}})
    log = said(capsys) + f"WARNING: client 3: {MARK} {'0' * 32} {fake}\n{MARK} {'1' * 32} {fake}\n{MARK} word {fake}\n"
    mirror(tmp_path / "here").read(log)
    assert json.loads((tmp_path / "here" / "summary.json").read_text()) == {"status": "completed"}


def test_only_files_of_results_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    announce = Announcer()
    for kind in ("../outside.json", "checkpoints/x", "run.log"):
        announce(kind, {})
    mirror(tmp_path / "here").read(said(capsys))
    assert not list((tmp_path / "here").iterdir())
    assert not (tmp_path / "outside.json").exists()


def test_a_shared_folder_is_left_to_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = a_run(tmp_path).folder
    before = {path: path.stat().st_mtime_ns for path in server.iterdir()}
    mirror(server).read(said(capsys))
    assert {path: path.stat().st_mtime_ns for path in server.iterdir()} == before


def test_the_stream_is_taken_up_again_where_it_broke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "server")
    log = tmp_path / "log"
    lines = said(capsys).splitlines(keepends=True)
    log.write_text("".join(lines[:6]))
    here = tmp_path / "here"
    with mirror(here, "cat", str(log)):
        wait_for(here / "metrics.jsonl")
        assert not (here / "summary.json").exists()
        log.write_text("".join(lines))
        wait_for(here / "summary.json")
    assert read_metrics(here) == [record(1), record(2)]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_an_error_is_announced_and_a_reader_sees_no_announcement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path / "error.json", {"reason": "no"}, Announcer())
    log = said(capsys)
    mirror(tmp_path / "here").read(log)
    assert json.loads((tmp_path / "here" / "error.json").read_text()) == {"reason": "no"}
    assert MARK in log
    assert without_announcements(log) == "\x1b[92mINFO \x1b[0m:      first\nordinary line {}\n"


def test_results_here_that_are_overwritten_stay_until_the_run_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "server")
    before, here = tmp_path / "here" / BEFORE, mirror(tmp_path / "here")
    before.mkdir()
    *log, summary = said(capsys).rpartition('{"n": 7')
    here.read("".join(log))
    assert before.exists()
    here.read("".join([*log, summary]))
    assert not before.exists()


def test_a_strangers_mark_neither_ends_the_reading_nor_hides_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like an announcement but lacks the word may not even be JSON."""
    a_run(tmp_path / "server")
    lines = said(capsys).splitlines(keepends=True)
    words = [f"client 3: {MARK} {'0' * 32} {{no JSON}}\n", f"client 4: {MARK} failed\n"]
    log = "".join(lines[:4] + words + lines[4:])
    mirror(tmp_path / "here").read(log)
    assert json.loads((tmp_path / "here" / "summary.json").read_text()) == {"status": "completed"}
    assert [line for line in without_announcements(log).splitlines(keepends=True) if MARK in line] == words
