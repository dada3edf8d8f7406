"""What the cache holds, kind by kind: all of it can be made again."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.errors import FedjetsError

KINDS = {
    "common-experts": "trained here, or received from a server",
    "embeddings": "what a common expert makes of simulated clients' samples",
    "folders": "a site's own images, decoded, and their embeddings, or its text as tokens",
    "text": "text as tokens",
    "vectors": "experts and gates that a site received",
}
"""Folders of a cache; whatever else lies there (private states, counts of epsilon, audit logs) is no cache."""


@dataclass(frozen=True)
class Holding:
    """What is kept of one kind.

    Attributes:
        kind: a key of :data:`KINDS`.
        files: how many.
        size: bytes of all.
        days: since the newest was written; None: there is none.
    """

    kind: str
    files: int
    size: int
    days: float | None


def holdings(cache: Path) -> list[Holding]:
    """Return what a cache holds of each kind."""
    return [_holding(cache, kind) for kind in KINDS]


def clear(cache: Path, kind: str) -> None:
    """Delete what a cache holds of one kind, or of ``all``.

    Raises:
        FedjetsError: there is no such kind.
    """
    if kind not in (*KINDS, "all"):
        raise FedjetsError(f"--clear {kind}: no such kind; give one of {', '.join(KINDS)}, or all")
    for name in KINDS if kind == "all" else [kind]:
        shutil.rmtree(cache / name, ignore_errors=True)


def _holding(cache: Path, kind: str) -> Holding:
    facts = [path.stat() for path in (cache / kind).rglob("*") if path.is_file()]
    newest = max((fact.st_mtime for fact in facts), default=None)
    days = None if newest is None else (time.time() - newest) / 86400
    return Holding(kind, len(facts), sum(fact.st_size for fact in facts), days)
