"""Where a site keeps what it makes of its own files: decoded images and their embeddings, or text as tokens."""

import hashlib
import shutil
from collections.abc import Iterable
from contextlib import suppress
from os import stat_result
from pathlib import Path

from fedjets_flwr.files import made_once, written


def site_name(place: Path) -> str:
    """Return what a site is called on its own disk, however its folder is written down."""
    return hashlib.sha256(str(place.resolve()).encode()).hexdigest()[:16]


def site_folder(cache: Path, place: Path) -> Path:
    """Return where all is kept that is made of a site's files; it goes as soon as one of them changes."""
    return cache / "folders" / site_name(place)


def site_file(cache: Path, place: Path, files: Iterable[tuple[Path, stat_result]], made: object) -> Path:
    """Return where in :func:`site_folder` something made of a site's files is kept.

    The folder is emptied first if the files are others than those that it was made of. Runs whose settings make
    different things of the same files keep them side by side; what a process still makes of older files has another
    name.

    Args:
        cache: the site's.
        place: its folder or file.
        files: all of the place and what the disk says of each; names, sizes and times count.
        made: what tells apart things that are made of the same files; its ``repr`` counts.
    """
    folder = site_folder(cache, place)
    seen = repr([(str(path), facts.st_size, facts.st_mtime_ns) for path, facts in files])
    digest, told = hashlib.sha256(seen.encode()).hexdigest(), folder / "made-of"

    def current() -> bool:
        with suppress(OSError):  # another process may just empty the folder
            return told.read_bytes() == digest.encode()
        return False

    if not current():
        with made_once(folder, wait=lambda: None):
            if not current():
                shutil.rmtree(folder, ignore_errors=True)
                with written(told) as path:
                    path.write_text(digest)
    return folder / f"{hashlib.sha256(repr((digest, made)).encode()).hexdigest()}.safetensors"
