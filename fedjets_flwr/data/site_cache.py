"""Where a site keeps what it makes of its own files: decoded images and their embeddings, or text as tokens."""

import hashlib
import shutil
from collections.abc import Iterable
from os import stat_result
from pathlib import Path

from fedjets_flwr.files import made_once, written


def site_folder(cache: Path, place: Path) -> Path:
    """Return where all is kept that is made of a site's files; it goes as soon as one of them changes."""
    return cache / "folders" / hashlib.sha256(str(place).encode()).hexdigest()[:16]


def current_site_folder(cache: Path, place: Path, files: Iterable[tuple[Path, stat_result]]) -> Path:
    """Return :func:`site_folder`, emptied if the files are others than those that it was made of.

    Runs whose settings make different things of the same files keep them side by side.

    Args:
        cache: the site's.
        place: its folder or file.
        files: all of the place and what the disk says of each; names, sizes and times count.
    """
    folder = site_folder(cache, place)
    seen = repr([(str(path), facts.st_size, facts.st_mtime_ns) for path, facts in files])
    digest, told = hashlib.sha256(seen.encode()).hexdigest(), folder / "made-of"

    def current() -> bool:
        return told.is_file() and told.read_bytes() == digest.encode()

    if not current():
        with made_once(folder, wait=lambda: None):
            if not current():
                shutil.rmtree(folder, ignore_errors=True)
                with written(told) as path:
                    path.write_text(digest)
    return folder
