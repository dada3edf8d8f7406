"""From finished runs to lines of a table: what each row reached over its seeds, and what it is held against."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedjets_flwr.compare.experiment import Experiment, Row, done
from fedjets_flwr.compare.figures import bits_course, epsilon_of
from fedjets_flwr.compare.gain import SHARES, rounds_to
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.moe.controls import CONTROLS, FREE, best_control, mean_controls
from fedjets_flwr.moe.metrics import READINGS, Reading
from fedjets_flwr.runs.records import ErrorTold, read_told
from fedjets_flwr.runs.tracking import read_metrics

CHOSEN = " †"
"""Marks the read-out of a row that the validation clients chose."""

Runs = Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""(summary, records) of a row's finished runs."""


@dataclass(frozen=True)
class Line:
    """One line of the table: values over seeds."""

    name: str
    last: list[float]
    best: list[float]
    masked: list[float]
    over_common: list[float]
    over_free: list[float]
    facts: Mapping[str, float]
    own_test: Sequence[float] = ()
    all_classes: Sequence[float] = ()
    told: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by clients, of their own models
    bits: Sequence[float] = ()
    tuned: Sequence[float] = ()
    reached: Mapping[str, Sequence[int | None]] = field(default_factory=dict)  # rounds by share of the gain


def lines_of(experiment: Experiment) -> list[Line]:
    """Return the table's lines of all finished runs: rows and readings, each after the controls that it shares."""
    finished = {c.run_dir: s for _, configs in experiment.rows for c in configs if (s := done(c.run_dir))}
    if not finished:
        return []
    controls, lines = _controls_by_row(experiment, finished), list[Line]()
    gains = _gains(experiment, finished)
    for row, configs in experiment.rows:
        runs = [(finished[c.run_dir], read_metrics(c.run_dir)) for c in configs if c.run_dir in finished]
        if not runs:
            continue
        lines += controls.get(row.name, [])
        if runs[0][0]["accuracy"] is None:
            line = Line(row.name, [], [], [], [], [], _facts(runs), reached=_reached(runs, gains))
            lines.append(replace(line, **_personal(runs)))
            continue
        own = runs[0][0]["reading"]
        marked = chosen(row, runs)
        for reading in [own, *(r for r in row.readings if r != own)]:
            lines.append(_line(named_by(row, reading, own) + CHOSEN * (reading == marked), reading, runs))
    return lines


def _controls_by_row(experiment: Experiment, finished: Mapping[Path, Mapping[str, Any]]) -> dict[str, list[Line]]:
    """Return the lines of controls by the name of the row that they stand before.

    Rows of the same unseen clients and common expert share them. Where not all do, a line names the first that does.
    """
    groups: list[tuple[str, dict[int, list[Scalar]], dict[int, Mapping[str, float]]]] = []
    for row, configs in experiment.rows:
        own = {s["seed"]: s["controls"] for c in configs if (s := finished.get(c.run_dir))}
        if not own or any(value is None for controls in own.values() for value in controls.values()):
            continue
        deciding = {c.run.seed: [c.flat()[key] for key in experiment.by_seed] for c in configs}
        for _, others, held in groups:
            alike = all(others.get(seed, settings) == settings for seed, settings in deciding.items())
            if alike and own.keys() & held and all(held.get(seed, found) == found for seed, found in own.items()):
                others |= deciding
                held |= own
                break
        else:
            groups.append((row.name, deciding, own))
    lines = {name: _controls(list(held.values())) for name, _, held in groups}
    if len(groups) == 1:
        return lines
    return {name: [replace(line, name=f"{name}: {line.name}") for line in some] for name, some in lines.items()}


def named_by(row: Row, reading: str, own: str) -> str:
    """Return what a row's line or curve of a read-out is called; its ``own`` goes without saying."""
    return row.name if reading == own else f"{row.name}, {reading}"


def chosen(row: Row, runs: Runs) -> str:
    """Return which of a row's read-outs the validation clients chose; empty if there was no choice."""
    if not row.readings:
        return ""
    return chosen_reading([summary for summary, _ in runs], [runs[0][0].get("reading") or "", *row.readings])


def chosen_reading(summaries: Sequence[Mapping[str, Any]], among: Sequence[str]) -> str:
    """Return the read-out that is best on the validation clients, by the mean over runs; empty without such clients."""
    measured = [summary.get("validation") for summary in summaries]
    if not all(measured):
        return ""
    return max(among, key=lambda reading: statistics.fmean(found["readings"][reading] for found in measured if found))


def _controls(measured: Sequence[Mapping[str, float]]) -> list[Line]:
    """Return the lines of all controls, of which some may be equal: without a batch norm AdaBN changes nothing."""
    known, free = mean_controls(measured), best_control(mean_controls(measured))
    lines = dict[object, Line]()
    for key in known:
        accuracy = [controls[key] for controls in measured]
        if "adabn" in key and accuracy == [controls.get(key.replace("_adabn", "")) for controls in measured]:
            continue
        name = f"{CONTROLS[key]} (bound)" if key not in FREE else CONTROLS[key]
        masked = [c["common_expert_adabn_masked" if "adabn" in key else "common_expert_masked"] for c in measured]
        over_common, over_free = (
            [a - c[of] for a, c in zip(accuracy, measured, strict=True)] for of in (FREE[0], free)
        )
        line = Line(name, accuracy, accuracy, masked, over_common, over_free, {})
        lines.setdefault(tuple(accuracy) if "adabn" in key else key, line)
    return list(lines.values())


def _line(name: str, reading: str, runs: Runs) -> Line:
    def values(records: Sequence[Mapping[str, Any]]) -> list[float]:
        return [r["evaluation"]["readings"][reading] for r in records if "evaluation" in r]

    last = [s["readings"][reading] for s, _ in runs]
    parts = Reading.of(reading)
    masked = next(name for name in READINGS if Reading.of(name) == parts._replace(prior="masked"))
    free = best_control(mean_controls([summary["controls"] for summary, _ in runs]))
    line = Line(
        name,
        last,
        [max(values(records)) for _, records in runs],
        [s["readings"][masked] for s, _ in runs],
        [value - s["controls"]["common_expert"] for value, (s, _) in zip(last, runs, strict=True)],
        [value - s["controls"][free] for value, (s, _) in zip(last, runs, strict=True)],
        _facts(runs),
    )
    return replace(line, **_personal(runs)) if reading == runs[0][0]["reading"] else line


def _personal(runs: Runs) -> dict[str, Any]:
    """Return a line's means over clients that train, of the runs that scored them: scores, and what they told."""
    found = [s.get("participants") or {} for s, _ in runs]
    names = sorted({name for own in found for name, value in own.items() if isinstance(value, float)})
    means = {name: [own[name] for own in found if name in own] for name in names}
    fields = {
        "local": "own_test", "global": "all_classes", "bits_per_byte": "bits", "tuned_bits_per_byte": "tuned",
    }  # fmt: skip
    told = {name: values for name, values in means.items() if name not in fields}
    return {attribute: means.get(name, []) for name, attribute in fields.items()} | {"told": told}


def _gains(experiment: Experiment, finished: Mapping[Path, Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return where the experiment's gain begins and ends, in bits per byte, by seed."""
    if experiment.gain is None:
        return {}
    ends: dict[str, dict[int, float]] = {experiment.gain.before: {}, experiment.gain.after: {}}
    for row, configs in experiment.rows:
        for summary in (finished[c.run_dir] for c in configs if row.name in ends and c.run_dir in finished):
            if (bits := (summary.get("participants") or {}).get("bits_per_byte")) is not None:
                ends[row.name][summary["seed"]] = bits
    before, after = ends[experiment.gain.before], ends[experiment.gain.after]
    return {seed: (before[seed], after[seed]) for seed in before.keys() & after.keys()}


def _reached(runs: Runs, gains: Mapping[int, tuple[float, float]]) -> dict[str, list[int | None]]:
    """Return each run's rounds to shares of the gain; nothing of clients that train in no round."""
    measured = [(bits_course(records), gains[s["seed"]]) for s, records in runs if s["seed"] in gains]
    if not measured or not any(s["client_rounds"] for s, _ in runs):
        return {}
    return {f"{share:.0%}": [rounds_to(share, course, *ends) for course, ends in measured] for share in SHARES}


def _facts(runs: Runs) -> dict[str, float]:
    """Return what a row's runs cost."""
    visits = [max(1, s["client_rounds"]) for s, _ in runs]
    mean = statistics.fmean
    return {
        "down": mean(s["bytes_down"] / n for (s, _), n in zip(runs, visits, strict=True)),
        "served": mean(s["bytes_served"] / n for (s, _), n in zip(runs, visits, strict=True)),
        "up": mean(s["bytes_up"] / n for (s, _), n in zip(runs, visits, strict=True)),
        "seconds": mean(s["seconds"]["round"] for s, _ in runs),
        "parameters": runs[0][0]["trained_parameters"],
        "flops": runs[0][0]["flops_per_answer"],
        "epsilon": epsilon_of(runs[0][0]),
    }


def failures_of(experiment: Experiment) -> list[tuple[str, int, str]]:
    """Return (row, failed runs, one reason) of the rows in which runs ended with an error: a result, too."""
    found = []
    for row, configs in experiment.rows:
        files = [c.run_dir / "error.json" for c in configs if done(c.run_dir) is None]
        errors = [error for file in files if (error := read_told(file, ErrorTold)) is not None]
        reasons = [error.get("reason", "").strip() for error in errors if error.get("status") != "stopped"]
        if reasons:
            found.append((row.name, len(reasons), (reasons[0].splitlines() or ["unknown"])[-1]))
    return found
