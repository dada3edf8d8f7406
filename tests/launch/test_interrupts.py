"""Signals that end a command."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.processes import heed_signals

COMMAND = """
    import sys, time
    from fedjets_flwr.cli import app as cli

    @cli.cli.command()
    def wait():
        print("up", flush=True)
        time.sleep(600)

    sys.argv = ["fedjets", "wait"]
    cli.main()
"""
FAREWELL = """
    import time
    from pathlib import Path
    from fedjets_flwr.launch.interrupts import Interrupts

    Interrupts()
    try:
        print("up", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(0.5)  # more signals come meanwhile
        print("bye", flush=True)
        Path("farewell").write_text("whole")
"""


def start(code: str, folder: Path, ignored: signal.Signals | None = None) -> "subprocess.Popen[str]":
    def prepare() -> None:
        heed_signals()
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, preexec_fn=prepare,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_exit_code_names_the_signal(tmp_path: Path, number: signal.Signals) -> None:
    process = start(COMMAND, tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number


def test_nohup_keeps_a_command_alive(tmp_path: Path) -> None:
    process = start(FAREWELL, tmp_path, ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    assert process.communicate(timeout=60)[0] == "bye\n"


def test_more_signals_do_not_break_off_the_end(tmp_path: Path) -> None:
    process = start(FAREWELL, tmp_path)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.communicate(timeout=60)[0] == "bye\n"


def test_a_second_ctrl_c_does(tmp_path: Path) -> None:
    process = start(FAREWELL, tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.communicate(timeout=60)[0] == ""
    assert not (tmp_path / "farewell").exists()


def test_a_closed_terminal_lets_a_command_end_in_order(tmp_path: Path) -> None:
    """What it prints after the terminal is gone must not be an error."""
    pid, terminal = pty.fork()
    if not pid:
        heed_signals()
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(FAREWELL)])
    assert os.read(terminal, 100).startswith(b"up")
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "farewell").read_text() == "whole"
