"""Comparisons: rows x seeds, each run once, one Markdown table and its figures.

An experiment is a YAML file: ``preset`` (TOML), ``seeds``, ``settings`` for all rows, optionally ``by-seed``, settings
with a value for each of the seeds (a common expert of its own, say), and ``rows``: ``name``, ``settings``, and
optionally ``seeds``, ``readings``, the read-outs of the same run that get a line each, and ``start``, the name of a row
above from whose models it starts (``run.start-from``); with ``run.rounds = 0`` it only scores them.
On text ``gain`` may name two rows, ``before`` and ``after``: every line then tells its rounds to shares of what lies
between their bits per byte.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.text import Text

from fedjets_flwr.compare.figures import bits_course, epsilon_of
from fedjets_flwr.compare.gain import SHARES, rounds_to
from fedjets_flwr.compare.sweep import sweep
from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.config.sources import absolute_paths, parse_pairs, read_preset, read_toml
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.follow import check
from fedjets_flwr.moe.controls import CONTROLS, FREE, best_control, mean_controls
from fedjets_flwr.moe.metrics import READINGS, Reading
from fedjets_flwr.reading import YAML, read
from fedjets_flwr.runs.tracking import read_metrics, write_json

Settings = dict[str, Scalar]


class Row(BaseModel):
    """One method of the comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    settings: dict[str, str | int | float | bool] = {}
    seeds: list[int] = []
    readings: list[str] = []
    start: str = ""

    @field_validator("readings")
    @classmethod
    def _known(cls, readings: list[str]) -> list[str]:
        if unknown := set(readings) - set(READINGS):
            raise ValueError(f"no such reading {', '.join(sorted(unknown))}; there are {', '.join(READINGS)}")
        return readings


class Gain(BaseModel):
    """Between which rows' last bits per byte a gain lies, seed by seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: str
    after: str


class File(BaseModel):
    """What an experiment's YAML file holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    preset: str
    seeds: list[int] = Field(min_length=1)
    settings: dict[str, str | int | float | bool] = {}
    by_seed: dict[str, list[str | int | float | bool]] = Field({}, alias="by-seed")
    rows: list[Row] = Field(min_length=1)
    gain: Gain | None = None

    @model_validator(mode="after")
    def _a_value_each(self) -> "File":
        for key, values in self.by_seed.items():
            if len(values) != len(self.seeds):
                raise ValueError(f"by-seed: {key}: {len(values)} values, but seeds has {len(self.seeds)}")
        for row in self.rows:
            if self.by_seed and (strangers := set(row.seeds) - set(self.seeds)):
                raise ValueError(f"by-seed: no value for seed {min(strangers)} of row {row.name!r}")
        return self

    def of_seed(self, seed: int) -> Settings:
        """Return the settings that runs of a seed share, beside the seed."""
        return {key: values[self.seeds.index(seed)] for key, values in self.by_seed.items()}


@dataclass(frozen=True)
class Experiment:
    """A checked experiment: the runs of each row, whose folders lie in ``parent``."""

    title: str
    parent: Path
    rows: tuple[tuple[Row, tuple[Config, ...]], ...]
    gain: Gain | None = None


def read_experiment(path: StrPath, extra: Sequence[str], output_dir: Path | None) -> Experiment:
    """Return the experiment in a YAML file, every setting of every run checked.

    Args:
        path: the file; its ``preset`` is the name of one, or a TOML file relative to the checkout.
        extra: ``key=value`` pairs that override every row.
        output_dir: parent folder of the runs; default: ``runs/<name of the file>``.

    Raises:
        FedjetsError: names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        file = File.model_validate(read(path, YAML))
    except ValidationError as error:
        first = error.errors()[0]
        why = first["msg"].removeprefix("Value error, ")
        parts = (str(path), ".".join(map(str, first["loc"])), why[:1].lower() + why[1:])
        raise FedjetsError(": ".join(filter(None, parts))) from None
    shared = _preset(file.preset, path) | file.settings
    parent = (output_dir or Path("runs") / path.stem).expanduser().absolute()
    shared |= {"run.output-dir": str(parent)}
    final = parse_pairs(extra)
    rows = []
    above: dict[tuple[str, int], Config] = {}
    for row in file.rows:
        configs = []
        for seed in row.seeds or file.seeds:
            own = file.of_seed(seed) | row.settings | {"run.seed": seed}
            if row.start:
                if (row.start, seed) not in above:
                    raise FedjetsError(f"{path}, row {row.name!r}: start: no row {row.start!r} of seed {seed} above it")
                own["run.start-from"] = str(above[row.start, seed].run_dir)
            no_rounds: Settings = {"run.rounds": 0} if own.get("run.rounds") == 0 else {}  # whatever all others have
            try:
                configs.append(_named(absolute_paths(shared | own | final | no_rounds)))
            except FedjetsError as error:
                raise FedjetsError(f"{path}, row {row.name!r}: {error}") from None
            if configs[-1].personalize.read_out != "familiar" and any(
                Reading.of(r).read_out == "familiar" for r in row.readings
            ):
                raise FedjetsError(f"{path}, row {row.name!r}: readings: familiar needs personalize.read-out: familiar")
            above[row.name, seed] = configs[-1]
        rows.append((row, tuple(configs)))
    names = {row.name for row in file.rows}
    for key, name in file.gain or ():
        if name not in names:
            raise FedjetsError(f"{path}: gain.{key}: no row {name!r}")
    return Experiment(file.title, parent, tuple(rows), file.gain)


def _preset(preset: str, path: Path) -> dict[str, Scalar]:
    """Return the settings of a preset by its name or, with its ending, of a file of the checkout of ``path``."""
    try:
        if preset.endswith(".toml"):
            return read_toml(path.resolve().parent.parent / preset, "preset:")
        return read_preset(preset)
    except FedjetsError as error:
        raise FedjetsError(f"{path}: {error}") from None


def _named(flat: Mapping[str, Scalar]) -> Config:
    """Return the settings with a run name of all that matters to the table, rounds and read-out included."""
    matters = {k: v for k, v in flat.items() if not k.startswith(("run.output-dir", "run.cache-dir", "data.dir"))}
    if "run.start-from" in matters:
        matters["run.start-from"] = Path(str(matters["run.start-from"])).name
    digest = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:8]
    return Config.from_flat({**flat, "run.name": f"{flat.get('strategy.name', 'fedjets')}-{digest}"})


def run_experiment(
    experiment: Experiment,
    folder: Path,
    run: Callable[[Config, Display], object],
    console: Console,
    validate: Callable[[Config], None],
    at_once: int = 1,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Do the runs that are not done, going on where one was cut off, so many at once; write the table after each.

    Args:
        experiment: the rows.
        folder: takes the table and its figures.
        run: does a run, in another thread than this one; raises FedjetsError where it fails.
        console: where progress is shown.
        validate: raises FedjetsError where a method refuses settings.
        at_once: runs at a time.
        stop: has those in progress end soon, when this thread is interrupted.

    Raises:
        FedjetsError: before the first run, if a row cannot run; at the end, if a run failed: what is done stays.
    """
    runs = {config.run_dir: config for _, configs in experiment.rows for config in configs}
    _check_rows(experiment, validate)
    numbers = {run_dir: number for number, run_dir in enumerate(runs, start=1)}
    waiting = [_resumed(config) for run_dir, config in runs.items() if done(run_dir) is None]
    over, failed, began = 0, list[str](), time.monotonic()

    def time_left() -> str:
        if not over:
            return ""
        return f"about {(len(waiting) - over) * (time.monotonic() - began) / over / 60:.0f} minutes left"

    def begins(config: Config) -> None:
        left = time_left()
        display.tell(config.run_name, f"run {numbers[config.run_dir]} of {len(runs)}{left and ', '}{left}")

    def ended(config: Config, error: FedjetsError | None) -> None:
        nonlocal over
        over += 1
        display.update(bar, advance=1, left=time_left())
        if error is not None:
            failed.append(config.run_name)
            _keep_reason(config.run_dir, error)
            display.tell(config.run_name, Text.assemble(("failed", "bold red"), f": {error}"))
        write_results(experiment, folder)

    with Display(console, at_once) as display, display.bar("runs", len(runs), len(runs) - len(waiting), "") as bar:
        sweep(waiting, at_once, lambda config: run(config, display), begins, ended, stop)
    write_results(experiment, folder)
    draw_results(experiment, folder)
    console.print((folder / "table.md").read_text())
    console.print(str(folder), soft_wrap=True)
    if failed:
        raise FedjetsError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; run again to retry them")


def _resumed(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})


def _check_rows(experiment: Experiment, validate: Callable[[Config], None]) -> None:
    for row, configs in experiment.rows:
        for config in configs:
            try:
                if done(config.run_dir) is None:
                    validate(config)
                    if not row.start:  # whose run may be one of these
                        check(config)
            except FedjetsError as error:
                raise FedjetsError(f"row {row.name!r}: {error}") from None


def _keep_reason(run_dir: Path, error: FedjetsError) -> None:
    """Have the table show a run as failed that ended before its ServerApp could say why."""
    path = run_dir / "error.json"
    if not path.is_file():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {"status": "failed", "reason": str(error), "expected": True})


def done(run_dir: Path) -> dict[str, Any] | None:
    """Return the summary of a finished run."""
    path = run_dir / "summary.json"
    summary: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return summary if summary and summary["status"] == "completed" else None


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
        chosen = _chosen(row, runs)
        for reading in [own, *(r for r in row.readings if r != own)]:
            lines.append(_line(_named_by(row, reading, own) + CHOSEN * (reading == chosen), reading, runs))
    return lines


def _controls_by_row(experiment: Experiment, finished: Mapping[Path, Mapping[str, Any]]) -> dict[str, list[Line]]:
    """Return the lines of controls by the name of the row that they stand before.

    Rows of the same unseen clients and common expert share them. Where not all do, a line names the first that does.
    """
    groups: list[tuple[str, dict[int, Mapping[str, float]]]] = []
    for row, configs in experiment.rows:
        own = {s["seed"]: s["controls"] for c in configs if (s := finished.get(c.run_dir))}
        if not own or any(value is None for controls in own.values() for value in controls.values()):
            continue
        for _, held in groups:
            if own.keys() & held and all(held.get(seed, controls) == controls for seed, controls in own.items()):
                held |= own
                break
        else:
            groups.append((row.name, own))
    lines = {name: _controls(list(held.values())) for name, held in groups}
    if len(groups) == 1:
        return lines
    return {name: [replace(line, name=f"{name}: {line.name}") for line in some] for name, some in lines.items()}


def _named_by(row: Row, reading: str, own: str) -> str:
    """Return what a row's line or curve of a read-out is called; its ``own`` goes without saying."""
    return row.name if reading == own else f"{row.name}, {reading}"


def _chosen(row: Row, runs: "Runs") -> str:
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
        name = f"{CONTROLS[key]} (bound)" if key not in FREE else CONTROLS[key]
        masked = [c["common_expert_adabn_masked" if "adabn" in key else "common_expert_masked"] for c in measured]
        over_common, over_free = (
            [a - c[of] for a, c in zip(accuracy, measured, strict=True)] for of in (FREE[0], free)
        )
        line = Line(name, accuracy, accuracy, masked, over_common, over_free, {})
        lines.setdefault(tuple(accuracy) if "adabn" in key else key, line)
    return list(lines.values())


Runs = Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]
"""(summary, records) of a row's finished runs."""


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


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _bits(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def _rounds(values: Sequence[int | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    mean = f"{statistics.fmean(found):.3g}"
    return mean if len(found) == len(values) else f"{mean} ({len(found)} of {len(values)})"


def failures_of(experiment: Experiment) -> list[tuple[str, int, str]]:
    """Return (row, failed runs, one reason) of the rows in which runs ended with an error: a result, too."""
    found = []
    for row, configs in experiment.rows:
        files = [c.run_dir / "error.json" for c in configs if done(c.run_dir) is None]
        errors = [json.loads(file.read_text()) for file in files if file.is_file()]
        reasons = [error["reason"].strip() for error in errors if error.get("status") != "stopped"]
        if reasons:
            found.append((row.name, len(reasons), reasons[0].splitlines()[-1]))
    return found


CHOSEN = " †"
"""Marks the read-out of a row that the validation clients chose."""

HEADINGS = (
    "method", "seeds", "last", "best", "classes known", "over common", "over best free", "kB down", "kB up", "s",
    "parameters", "MFLOPs",
)  # fmt: skip


def markdown(experiment: Experiment) -> str:
    """Return the table: percentages, mean ± standard deviation over seeds."""
    lines = lines_of(experiment)
    private = any(line.facts.get("epsilon") for line in lines)
    personal, textual = any(line.own_test for line in lines), any(line.bits for line in lines)
    tuned, shares = any(line.tuned for line in lines), list(dict.fromkeys(s for line in lines for s in line.reached))
    told = sorted({name for line in lines for name in line.told})
    headings = [
        *HEADINGS,
        *(["own tests", "all classes"] if personal else []),
        *(["bits per byte", "kB served"] if textual else []),
    ]
    headings += [*(["tuned"] if tuned else []), *(f"rounds to {share}" for share in shares)]
    headings += [*(["ε"] if private else []), *(name.replace("-", " ") for name in told)]
    columns = len(headings) - 1
    text = [f"# {experiment.title}\n", "", "| " + " | ".join(headings) + " |", "|---" + "|---:" * columns + "|"]
    for line in lines:
        f = line.facts
        cost = (
            [f"{f['down'] / 1e3:.1f}", f"{f['up'] / 1e3:.1f}", f"{f['seconds']:.0f}", f"{f['parameters']:,.0f}",
             f"{f['flops'] / 1e6:.3g}"]
            if f else ["", "", "", "", ""]
        )  # fmt: skip
        cells = [
            line.name, str(max(len(line.last), len(line.own_test))), _spread(line.last), _spread(line.best),
            _spread(line.masked), _spread(line.over_common, "+"), _spread(line.over_free, "+"), *cost,
        ]  # fmt: skip
        if personal:
            cells += [_spread(line.own_test), _spread(line.all_classes)]
        if textual:
            cells += [_bits(line.bits), f"{f['served'] / 1e3:.1f}" if f else ""]
        if tuned:
            cells.append(_bits(line.tuned))
        cells += [_rounds(line.reached.get(share, ())) for share in shares]
        if private:
            cells.append(f"{f['epsilon']:.2f}" if f.get("epsilon") else "")
        cells += [_spread(line.told.get(name, ())) for name in told]
        text.append("| " + " | ".join(cells) + " |")
    text += [f"| {name} | {seeds} | failed" + " |" * (columns - 1) for name, seeds, _ in failures_of(experiment)]
    text += [
        "",
        "Accuracy in percent over the unseen clients: after the last round, the best evaluation, and with the other"
        " classes masked. Over best free: above the best common expert, by the mean over seeds, that reads no label."
        " kB: encoded bytes of training per client and round. s: all rounds. Parameters: trained ones"
        " that a served client holds; MFLOPs: their forward pass, one sample.",
        "",
    ]
    if any(line.name.endswith(CHOSEN) for line in lines):
        text += [
            "†: of the row's read-outs the best on the validation clients, which are no part of the numbers here. The"
            " unseen clients were scored once, after the last round.",
            "",
        ]
    if personal:
        text += [
            "Own tests: accuracy of clients that train, on test samples of their own, after adapting the model where"
            " the method does; all classes: of the same models on test images of all classes. Means over clients.",
            "",
        ]
    if textual:
        text += [
            "Bits per byte: of the test texts of clients that train; own tests: next tokens told right. kB served: what"
            " clients got to be scored; one that is asked to train what it was just scored with gets nothing down.",
            "",
        ]
    if tuned:
        text += [
            "Tuned: bits per byte of the same models after a round's local training more on a client's own text.",
            "",
        ]
    if shares and experiment.gain is not None:
        text += [
            f"Rounds to a share of the gain in bits per byte from {experiment.gain.before!r} to"
            f" {experiment.gain.after!r}: the first that was scored there; of some runs only: the mean over those that"
            " got there.",
            "",
        ]
    if private:
        text += [
            "ε: of the client with the largest one, for a reader who knows the cohorts, at the `privacy.delta` of the"
            " settings; none without noise.",
            "",
        ]
    text += [f"{name}: {reason}\n" for name, _, reason in failures_of(experiment)]
    return "\n".join(text)


def write_results(experiment: Experiment, folder: Path) -> None:
    """Write ``table.md`` and ``results.json`` of what is done so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(markdown(experiment))
    lines = [vars(line) for line in lines_of(experiment)]
    write_json(folder / "results.json", {"title": experiment.title, "lines": lines})


def draw_results(experiment: Experiment, folder: Path) -> None:
    """Draw the figures of what is done."""
    from fedjets_flwr.compare.figures import draw

    finished: dict[str, Runs] = {}
    readings: dict[str, str] = {}
    for row, configs in experiment.rows:
        runs = [(summary, read_metrics(c.run_dir)) for c in configs if (summary := done(c.run_dir))]
        if not runs:
            continue
        own = runs[0][0].get("reading") or ""
        drawn = _chosen(row, runs) or own
        name = _named_by(row, drawn, own)
        finished[name], readings[name] = runs, drawn
    if finished:
        draw(experiment.title, finished, folder, readings)
