"""What a run wrote into its folder so far, whether it finished, failed or was killed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.runs.records import (
    SETTINGS_TOLD,
    ErrorTold,
    ProgressTold,
    SummaryTold,
    checked_records,
    read_told,
)
from fedjets_flwr.runs.tracking import read_metrics, results_of

SETTINGS = {"strategy": "strategy.name", "dataset": "data.name", "seed": "run.seed"}
"""What a summary repeats of the settings."""


@dataclass(frozen=True)
class Recorded:
    """The files of a run folder.

    Attributes:
        settings: ``config.json``.
        results: ``summary.json``; without one, as much of it as the rounds so far tell.
        records: the rounds of ``metrics.jsonl``.
        finished: whether there is a ``summary.json``.
        error: why it failed or was stopped, if it did; a finished run stays one whatever fails to go on from it.
        stopped: whether it was stopped.
        progress: what it last said before its first round.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]
    finished: bool
    error: str
    stopped: bool
    progress: str

    @property
    def status(self) -> str:
        """``completed``, ``failed``, ``stopped`` or ``unfinished``."""
        if self.error:
            return "stopped" if self.stopped else "failed"
        return str(self.results.get("status", "completed")) if self.finished else "unfinished"


def read_recorded(folder: StrPath) -> Recorded:
    """Return what a run folder holds.

    Raises:
        FedjetsError: it is no folder of a run, or a file in it is damaged.
    """
    folder = Path(folder)
    settings = read_told(folder / "config.json", SETTINGS_TOLD)
    if settings is None:
        raise FedjetsError(f"{folder}: no config.json there; give the folder of a run, e.g. runs/<its name>")
    records, summary = read_metrics(folder), read_told(folder / "summary.json", SummaryTold)
    checked_records(records, folder / "metrics.jsonl")
    error = (read_told(folder / "error.json", ErrorTold) if summary is None else None) or {}
    if (results := summary) is None:
        told = {name: settings.get(setting) for name, setting in SETTINGS.items()}
        results = told | (read_told(folder / "prepared.json", SummaryTold) or {}) | results_of(records)
    return Recorded(
        folder=folder,
        settings=settings,
        results=results,
        records=records,
        finished=summary is not None,
        error=error.get("reason", "").strip(),
        stopped=error.get("status") == "stopped",
        progress=(read_told(folder / "progress.json", ProgressTold) or {}).get("text", ""),
    )
