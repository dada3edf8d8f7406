"""A daemon and all that it started end with whoever started it, whatever they do against it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedjets_flwr.launch import guard
from fedjets_flwr.launch.daemons import kill_daemon, start_daemon, stop_daemons
from tests.support.processes import wait_until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")

RUNAWAY = """\
import os, signal, sys, time
from pathlib import Path

def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

def note(name):
    Path(f"{name}.new").write_text(str(os.getpid()))
    Path(f"{name}.new").rename(name)

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        deaf()
        note("runaway")
        time.sleep(600)
    os._exit(0)
os.wait()
"""
"""Starts a process that leaves its session and its parent and heeds no polite signal; ``runaway`` holds its id."""
STAYS = RUNAWAY + "note('daemon'); time.sleep(600)"
DEAF = RUNAWAY + "deaf(); note('daemon'); time.sleep(600)"
ENDS = RUNAWAY + "while not Path('runaway').exists(): time.sleep(0.01)\nsys.exit(7)"
PHOENIX = """\
import os, signal, time

def again(*_):
    if os.fork():
        os._exit(0)
    with open("lives", "a") as file:
        print(os.getpid(), file=file)

signal.signal(signal.SIGTERM, again)
with open("lives", "a") as file:
    print(os.getpid(), file=file)
while True:
    time.sleep(600)
"""
"""A process that starts another in its place when it is told to end; ``lives`` holds the id of each."""
LAUNCHER = """\
import os, sys, time
from pathlib import Path
from fedjets_flwr.launch.daemons import start_daemon

start_daemon([sys.executable, "-c", sys.argv[1]], dict(os.environ), Path.cwd(), Path("log"), Path("scratch").absolute())
time.sleep(600)
"""


def start(folder: Path, text: str) -> "subprocess.Popen[bytes]":
    return start_daemon([sys.executable, "-c", text], dict(os.environ), folder, folder / "log")


def written(path: Path) -> int:
    """Return the process id in a file, once it is there."""
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return int(path.read_text())


def test_all_end_soon_after_a_launcher_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "key").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, STAYS], cwd=tmp_path, env=environment)
    family = [written(tmp_path / name) for name in ("daemon", "runaway")]
    launcher.kill()
    launcher.wait()
    wait_until_gone(family, seconds=15)
    deadline = time.monotonic() + 15
    while (tmp_path / "scratch").exists():  # with keys and tokens
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("text", "stop", "code"),
    [
        pytest.param(STAYS, lambda daemon: stop_daemons([daemon]), 128 + signal.SIGTERM, id="stopped"),
        pytest.param(DEAF, lambda daemon: stop_daemons([daemon]), 128 + signal.SIGKILL, id="deaf"),
        pytest.param(STAYS, lambda daemon: stop_daemons([daemon], at_once=True), 128 + signal.SIGKILL, id="at once"),
        pytest.param(DEAF, kill_daemon, 128 + signal.SIGKILL, id="killed"),
    ],
)
def test_what_a_daemon_started_ends_with_it(
    tmp_path: Path, text: str, stop: Callable[["subprocess.Popen[bytes]"], None], code: int
) -> None:
    daemon = start(tmp_path, text)
    family = [written(tmp_path / name) for name in ("daemon", "runaway")]
    stop(daemon)
    wait_until_gone(family, seconds=0)  # when it returns, they are gone
    assert daemon.returncode == code


def test_a_daemon_that_ends_takes_along_what_it_started(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    scratch = tmp_path / "scratch"
    daemon = start_daemon([sys.executable, "-c", ENDS], dict(os.environ), tmp_path, tmp_path / "log", scratch)
    assert daemon.wait(timeout=60) == 7
    assert scratch.is_dir()  # its launcher is there to look at it
    wait_until_gone([written(tmp_path / "runaway")], seconds=0)


def test_what_rises_again_when_it_is_ended_ends_all_the_same(tmp_path: Path) -> None:
    daemon = start(tmp_path, PHOENIX)
    written(tmp_path / "lives")
    stop_daemons([daemon])
    lives = [int(pid) for pid in (tmp_path / "lives").read_text().split()]
    assert len(lives) > 1
    wait_until_gone(lives, seconds=0)


def test_a_launcher_that_died_early_starts_nothing_that_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", guard.__file__, "1", "", "sleep", "600"]  # 1 is not its parent
    assert subprocess.run(command, timeout=30, check=False).returncode == 128 + signal.SIGTERM


def test_a_guard_that_does_not_listen_yet_is_told_again(tmp_path: Path) -> None:
    """Below a shell's ``&`` the signal of a crash is ignored until the guard has its handler, and would be lost."""
    before = signal.signal(guard.CRASH, signal.SIG_IGN)
    try:
        daemon = start_daemon(["sleep", "60"], dict(os.environ), tmp_path, tmp_path / "log")
        killing = threading.Thread(target=kill_daemon, args=[daemon], daemon=True)
        killing.start()
        killing.join(20)
        assert not killing.is_alive()
        assert daemon.returncode == 128 + signal.SIGKILL
    finally:
        signal.signal(guard.CRASH, before)
        stop_daemons([daemon], at_once=True)


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    daemon = start_daemon(["no-such-daemon"], dict(os.environ), tmp_path, tmp_path / "log")
    assert daemon.wait(timeout=60) == 127
    assert (tmp_path / "log").read_text() == "no-such-daemon: No such file or directory\n"
