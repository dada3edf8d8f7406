"""What a run wrote into its folder so far, whether it finished, failed or was killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.tracking import read_metrics


@dataclass(frozen=True)
class Recorded:
    """The files of a run folder.

    Attributes:
        settings: ``config.json``.
        results: ``summary.json``; without one, as much of it as the rounds so far tell.
        records: the rounds of ``metrics.jsonl``.
        finished: whether there is a ``summary.json``.
        error: why it failed, if it did.
        progress: what it last said before its first round.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]
    finished: bool
    error: str
    progress: str

    @property
    def status(self) -> str:
        """``completed``, ``failed`` or ``unfinished``."""
        if self.error:
            return "failed"
        return str(self.results.get("status", "completed")) if self.finished else "unfinished"


def read_recorded(folder: Path) -> Recorded:
    """Return what a run folder holds.

    Raises:
        FedjetsError: it is no folder of a run, or a file in it is damaged.
    """
    settings = _read(folder / "config.json")
    if settings is None:
        raise FedjetsError(f"{folder}: no config.json there; give the folder of a run, e.g. runs/<its name>")
    records, summary = read_metrics(folder), _read(folder / "summary.json")
    prepared, error = _read(folder / "prepared.json") or {}, _read(folder / "error.json") or {}
    return Recorded(
        folder=folder,
        settings=settings,
        results=summary if summary is not None else prepared | _so_far(settings, records),
        records=records,
        finished=summary is not None,
        error=str(error.get("reason", "")).strip(),
        progress=str((_read(folder / "progress.json") or {}).get("text", "")),
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text()) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise FedjetsError(f"{path}: cannot be read ({error})") from None
    if value is not None and not isinstance(value, dict):
        raise FedjetsError(f"{path}: damaged: no JSON object")
    return value


def _so_far(settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``summary.json`` would say of the rounds so far."""
    seconds: dict[str, float] = {}
    for record in records:
        for name, value in record["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    told: dict[str, Any] = {
        "strategy": settings.get("strategy.name", ""),
        "dataset": settings.get("data.name", ""),
        "seed": settings.get("run.seed"),
        "rounds": len(records),
        "seconds": seconds,
    }
    for name in ("bytes_down", "bytes_up", "bytes_served", "wire_bytes"):
        told[name] = sum(record.get(name, 0) for record in records)
    evaluated = [(record["round"], record["evaluation"]) for record in records if "evaluation" in record]
    if evaluated:
        last = evaluated[-1][1]
        told["best_round"], best = max(evaluated, key=lambda e: e[1]["accuracy"])
        told |= {"best_accuracy": best["accuracy"], "gate_collapsed": last["collapsed"]}
        told |= {k: last[k] for k in ("accuracy", "reading", "per_client_accuracy", "readings", "chosen")}
        told |= {"gate_entropy": last["gate_entropy"], "routing": {"expert_load": last["expert_load"]}}
    for record in records:
        if "inspection" in record:
            told["expert_class_accuracy"] = record["inspection"]["expert_class_accuracy"]
    return told
