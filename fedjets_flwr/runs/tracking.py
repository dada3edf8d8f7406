"""Results on disk: ``config.json``, ``metrics.jsonl`` (one object a round), ``summary.json``."""

import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.printable import printable
from fedjets_flwr.reading import JSON
from fedjets_flwr.release import code_digest
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.runs.claim import holds_results
from fedjets_flwr.runs.records import ProgressTold, read_told
from fedjets_flwr.runs.remote_log import Announcer
from fedjets_flwr.runs.score import COURSES, best_of

if TYPE_CHECKING:  # the launcher reads results, and must not wait for torch
    from torch import Tensor

log = logging.getLogger("flwr")

BYTES = ("bytes_down", "bytes_up", "bytes_served", "wire_bytes")
"""Traffic of a round, as its record counts it."""


def write_json(path: Path, value: object) -> None:
    """Write JSON in one step; refuses NaN."""
    with written(path) as file:
        file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def publish(path: Path, value: object, announce: Announcer | None) -> None:
    """Write a JSON file of a run folder and, deployed, announce it to the launcher."""
    write_json(path, value)
    if announce is not None:
        announce(path.name, value)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl`` up to a line that is none, such as a half-written last one."""
    path = folder / "metrics.jsonl"
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = JSON.load(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def facts_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the newest loss and accuracy of some records for a reader."""
    loss = records[-1]["loss"]
    facts = f"loss {loss:.3f}" if loss is not None else "loss -"
    for kind, who in COURSES.items():
        evaluations = [r[kind] for r in records if kind in r]
        facts += f", {who} {evaluations[-1]['accuracy']:.3f}" if evaluations else ""
    own = [r["participants"] for r in records if "participants" in r]
    if own and "bits_per_byte" in own[-1]:
        facts += f", {own[-1]['bits_per_byte']:.3f} bits per byte"
    return facts + (f", clients' own tests {own[-1]['local']:.3f}" if own else "")


def read_warnings(folder: Path) -> list[str]:
    """Return what a run in progress warned of."""
    with suppress(FedjetsError):
        told = read_told(folder / "progress.json", ProgressTold) or {}
        return [printable(text) for text in told.get("warnings", [])]
    return []


class Tracker(Callback):
    """Writes a run's folder, and announces it to a launcher on another machine."""

    def __init__(self, config: Config, announce: Announcer | None = None) -> None:
        self.folder, self.config, self._announce = config.run_dir, config, announce
        self.folder.mkdir(parents=True, exist_ok=True)
        self._warnings: list[str] = []
        self.say("starting the run")
        if not holds_results(self.folder):
            self.write("config.json", config.flat())
        self.prepared: dict[str, Any] = {}

    def write(self, name: str, value: object) -> None:
        """Write a JSON file of the run folder."""
        publish(self.folder / name, value, self._announce)

    def cut_back(self, server_round: int) -> None:
        """Keep only the records up to a round, from which the run goes on: what no checkpoint holds never happened."""
        (self.folder / "summary.json").unlink(missing_ok=True)
        self.write("config.json", self.config.flat())
        kept = [record for record in read_metrics(self.folder) if record["round"] <= server_round]
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        with written(self.folder / "metrics.jsonl") as file:
            file.write_text(text)
        if self._announce is not None:
            self._announce("cut", kept)

    def say(self, text: str) -> None:
        """Tell a reader of the log, and a watching launcher, what goes on before round 1."""
        log.info("%s", text)
        self._text = text
        self._tell()

    def warn(self, text: str) -> None:
        """Tell them what they should know before the rounds take their time."""
        log.warning("%s", text)
        self._warnings.append(text)
        self._tell()

    def _tell(self) -> None:
        word = {"word": self._announce.word} if self._announce is not None else {}
        self.write("progress.json", {"text": self._text, "warnings": self._warnings} | word)

    def set_controls(
        self,
        controls: Mapping[str, float | None],
        per_client: Mapping[int, float],
        computed: int,
        of_validation: Mapping[str, float | None] | None = None,
    ) -> None:
        """Keep what does not change over the rounds: the controls of the unseen clients, and of validation clients."""
        self.prepared = {
            "common_expert_accuracy": controls["common_expert"],
            "common_expert_per_client": {str(k): v for k, v in per_client.items()},
            "controls": dict(controls),
            "embeddings_computed": computed,
        } | ({} if of_validation is None else {"validation_controls": dict(of_validation)})
        self.write("prepared.json", self.prepared)

    def on_round(self, record: Mapping[str, Any], vectors: "Mapping[str, Tensor]") -> None:
        """Append one round."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._announce is not None:
            self._announce("record", finite(record))
        log.info("round %d/%d: %s", record["round"], self.config.run.rounds, facts_of([record]))

    def finish(self, status: str, digest: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Write and return ``summary.json``."""
        c = self.config
        summary = {
            "status": status,
            "strategy": c.strategy.name,
            "dataset": c.data.name,
            "seed": c.run.seed,
            **self.prepared,
            **results_of(read_metrics(self.folder)),
            "weights_hash": digest,
            "code": code_digest(),
            "versions": {name: version(name) for name in ("flwr", "torch", "torchvision", "numpy", "ray")}
            | {"python": platform.python_version()},
            **extra,
        }
        self.write("summary.json", finite(summary))
        return summary


def results_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what ``summary.json`` says of the rounds, all of a finished run or those so far of another."""
    seconds: dict[str, float] = {}
    for record in records:
        for name, value in record["seconds"].items():
            seconds[name] = round(seconds.get(name, 0.0) + value, 3)
    return {
        "rounds": sum(record["round"] > 0 for record in records),
        **_measured(records),
        "validation": _validated(records),
        "participants": next((r["participants"] for r in reversed(records) if "participants" in r), {}),
        "usual": next((r["usual"] for r in reversed(records) if "usual" in r), {}),
        "score": best_of(records),
        "client_rounds": sum(len(r["cohort"]) for r in records),
        **{name: sum(r.get(name, 0) for r in records) for name in BYTES},
        "failures": sum(len(r["failures"]) for r in records),
        "seconds": seconds,
    }


def _measured(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured on the unseen clients; without labels there is nothing but the experts they got."""
    served = {client: ids for r in records[-1:] for client, ids in r.get("served", {}).items()}
    evaluations = [(r["round"], r["evaluation"]) for r in records if "evaluation" in r]
    if not evaluations:
        return {"accuracy": None, "best_accuracy": None, "per_client_accuracy": {}, "chosen": served}
    last = evaluations[-1][1]
    best_round, best = max(evaluations, key=lambda e: e[1]["accuracy"])
    measured = {
        "accuracy": last["accuracy"],
        "best_accuracy": best["accuracy"],
        "best_round": best_round,
        "reading": last["reading"],
        "per_client_accuracy": last["per_client_accuracy"],
        "readings": last["readings"],
        "chosen": last["chosen"] | served,
        "routing": {"expert_load": last["expert_load"]},
        "gate_entropy": last["gate_entropy"],
        "gate_collapsed": last["collapsed"],
        "kept_common": last.get("kept_common", []),
    }
    for inspection in [r["inspection"] for r in records if "inspection" in r][-1:]:  # none before its time
        measured["routing"] = inspection["routing"] | measured["routing"]
        measured["expert_class_accuracy"] = inspection["expert_class_accuracy"]
    return measured


def _validated(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured on the validation clients, by which settings may be chosen; nothing without any."""
    evaluations = [(r["round"], r["validation"]) for r in records if "validation" in r]
    if not evaluations:
        return {}
    best_round, best = max(evaluations, key=lambda e: e[1]["accuracy"])
    told = ("accuracy", "reading", "readings", "per_client_accuracy", "chosen")
    last = {name: evaluations[-1][1][name] for name in told}
    return last | {"best_accuracy": best["accuracy"], "best_round": best_round}


def finite(value: Any) -> Any:
    """Return the value with every NaN and infinity as None, since JSON has neither."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
