"""A reader's shell: a copy of the checkout, a home of its own, and commands that are processes of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedjets_flwr.launch.daemons import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("FEDJETS_", "FLWR_", "XDG_")
TAIL = 4000


class CommandFailed(Exception):
    """A command did not exit with 0; holds the end of its output."""


class Shell:
    """Runs commands in a fresh copy of the checkout; environment and folder stay from one command to the next."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fedjets-documents-"))
        self.checkout, self.home = self._folder / "fedjets-flwr", self._folder / "home"
        self._state, self._output = self._folder / "state", self._folder / "output"
        self.home.mkdir()
        self._state.touch()
        copy_checkout(ROOT, self.checkout)
        self._environment = environment_of(self.home, self.checkout)

    def run(self, command: str) -> None:
        """Run a command to its end.

        Raises:
            CommandFailed: it did not exit with 0.
        """
        keep = f'{{ export -p; printf "cd %q\\n" "$PWD"; }} > "{self._state}"'
        script = f'. "{self._state}"\n{command}\n{keep}'
        with self._output.open("w") as output:  # a pipe would stay open as long as anything in the background
            done = subprocess.run(
                ["bash", "-eo", "pipefail", "-c", script], cwd=self.checkout, env=self._environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if done.returncode:
            said = self._output.read_text(errors="replace")[-TAIL:]
            raise CommandFailed(f"$ {command}\n{said}\nexit code {done.returncode}")

    def write(self, path: str, text: str) -> None:
        """Write a new file of the checkout.

        Raises:
            CommandFailed: it is there already.
        """
        file = self.checkout / path
        if file.exists():
            raise CommandFailed(f"{path} is there already")
        file.write_text(text)

    def close(self) -> None:
        """End whatever the commands left running, and remove the copy."""
        for _ in range(3):  # a process that begins a program shows no environment for a moment, and may start others
            kill_all_at(self.home)
            time.sleep(0.1)
        shutil.rmtree(self._folder, ignore_errors=True)


def environment_of(home: Path, checkout: Path) -> dict[str, str]:
    """Return the environment of a reader who has the project installed and nothing else set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    data = os.environ.get("FEDJETS_DATA")
    return kept | ({"FEDJETS_DATA": str(Path(data).absolute())} if data else {}) | {
        "HOME": str(home),
        "PATH": f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_ports(1)[0]),  # not that of other tests or of the user
    }  # fmt: skip


def kill_all_at(home: Path) -> None:
    """Kill the processes that have a folder as their home (Linux)."""
    mark = f"HOME={home}\0".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def copy_checkout(root: Path, folder: Path) -> None:
    """Copy the files that git tracks, as they are in the working tree, and a ``.venv`` that stands for this one."""
    for name in tracked(root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'export PATH="{sys.prefix}/bin:$PATH"\n')


def tracked(root: Path) -> list[str]:
    """Return the files of a checkout that git tracks and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (root / name).is_file()]


def commands(source: str) -> list[str]:
    """Return the commands of a script: each has as few lines as bash itself calls complete."""
    found: list[str] = []
    lines: list[str] = []
    for line in source.splitlines():
        lines.append(line)
        if is_complete("\n".join(lines)):
            found.append("\n".join(lines))
            lines = []
    found.append("\n".join(lines))  # an unfinished one fails when it is run
    return [text for text in found if any(part.strip() and part.lstrip()[0] != "#" for part in text.splitlines())]


def is_complete(text: str) -> bool:
    """Return whether bash waits for no further line."""
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    return read.returncode == 0 and not read.stderr and not text.endswith("\\")
