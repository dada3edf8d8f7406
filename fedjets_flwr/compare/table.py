"""The table of a comparison, in Markdown and JSON, and its figures."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fedjets_flwr.compare.experiment import Experiment, done
from fedjets_flwr.compare.lines import CHOSEN, Line, Runs, chosen, failures_of, lines_of, named_by
from fedjets_flwr.runs.tracking import read_metrics, write_json

Column = tuple[str, Callable[[Line], str]]
"""Heading, and what it says of a line."""


def markdown(experiment: Experiment) -> str:
    """Return the table: percentages, mean ± standard deviation over seeds."""
    return _table(experiment, lines_of(experiment))


def _table(experiment: Experiment, lines: Sequence[Line]) -> str:
    failures = failures_of(experiment)
    columns = _columns(lines)
    text = [
        f"# {experiment.title}\n",
        "",
        _row(heading for heading, _ in columns),
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    text += [_row(cell(line) for _, cell in columns) for line in lines]
    text += [f"| {name} | {seeds} | failed" + " |" * (len(columns) - 2) for name, seeds, _ in failures]
    text += ["", *(part for note in _notes(experiment, lines) for part in (note, ""))]
    text += [f"{name}: {reason}\n" for name, _, reason in failures]
    return "\n".join(text)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _columns(lines: Sequence[Line]) -> list[Column]:
    """Return what the table tells of each line: of what no line has, nothing."""
    columns: list[Column] = [
        ("method", lambda line: line.name),
        ("seeds", lambda line: str(max(len(line.last), len(line.own_test)))),
        ("last", lambda line: _spread(line.last)),
        ("best", lambda line: _spread(line.best)),
        ("classes known", lambda line: _spread(line.masked)),
        ("over common", lambda line: _spread(line.over_common, "+")),
        ("over best free", lambda line: _spread(line.over_free, "+")),
        ("kB down", _fact("down", lambda value: f"{value / 1e3:.1f}")),
        ("kB up", _fact("up", lambda value: f"{value / 1e3:.1f}")),
        ("s", _fact("seconds", lambda value: f"{value:.0f}")),
        ("parameters", _fact("parameters", lambda value: f"{value:,.0f}")),
        ("MFLOPs", _fact("flops", lambda value: f"{value / 1e6:.3g}")),
    ]
    if any(line.own_test for line in lines):
        columns += [
            ("own tests", lambda line: _spread(line.own_test)),
            ("all classes", lambda line: _spread(line.all_classes)),
        ]
    if any(line.bits for line in lines):
        columns += [
            ("bits per byte", lambda line: _bits(line.bits)),
            ("kB served", _fact("served", lambda value: f"{value / 1e3:.1f}")),
        ]
    if any(line.tuned for line in lines):
        columns.append(("tuned", lambda line: _bits(line.tuned)))
    columns += [
        (f"rounds to {share}", _reached(share)) for share in dict.fromkeys(s for line in lines for s in line.reached)
    ]
    if _private(lines):
        columns.append(("ε", _fact("epsilon", lambda value: f"{value:.2f}" if value else "")))
    columns += [
        (name.replace("-", " "), _told(name)) for name in sorted({name for line in lines for name in line.told})
    ]
    return columns


def _fact(name: str, say: Callable[[float], str]) -> Callable[[Line], str]:
    return lambda line: say(line.facts[name]) if line.facts else ""


def _reached(share: str) -> Callable[[Line], str]:
    return lambda line: _rounds(line.reached.get(share, ()))


def _told(name: str) -> Callable[[Line], str]:
    return lambda line: _spread(line.told.get(name, ()))


def _private(lines: Sequence[Line]) -> bool:
    return any(line.facts.get("epsilon") for line in lines)


def _notes(experiment: Experiment, lines: Sequence[Line]) -> Iterator[str]:
    """Yield what a reader must know of the columns that the table has."""
    yield (
        "Accuracy in percent over the unseen clients: after the last round, the best evaluation, and with the other"
        " classes masked. Over best free: above the best common expert, by the mean over seeds, that reads no label."
        " kB: encoded bytes of training per client and round. s: all rounds. Parameters: trained ones"
        " that a served client holds; MFLOPs: their forward pass, one sample."
    )
    if any(line.name.endswith(CHOSEN) for line in lines):
        yield (
            "†: of the row's read-outs the best on the validation clients, which are no part of the numbers here. The"
            " unseen clients were scored once, after the last round."
        )
    if any(line.own_test for line in lines):
        yield (
            "Own tests: accuracy of clients that train, on test samples of their own, after adapting the model where"
            " the method does; all classes: of the same models on test images of all classes. Means over clients."
        )
    if any(line.bits for line in lines):
        yield (
            "Bits per byte: of the test texts of clients that train; own tests: next tokens told right. kB served: what"
            " clients got to be scored; one that is asked to train what it was just scored with gets nothing down."
        )
    if any(line.tuned for line in lines):
        yield "Tuned: bits per byte of the same models after a round's local training more on a client's own text."
    if any(line.reached for line in lines) and experiment.gain is not None:
        yield (
            f"Rounds to a share of the gain in bits per byte from {experiment.gain.before!r} to"
            f" {experiment.gain.after!r}: the first that was scored there; of some runs only: the mean over those that"
            " got there."
        )
    if _private(lines):
        yield (
            "ε: of the client with the largest one, for a reader who knows the cohorts, at the `privacy.delta` of the"
            " settings; none without noise."
        )


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


def write_results(experiment: Experiment, folder: Path) -> None:
    """Write ``table.md`` and ``results.json`` of what is done so far."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines_of(experiment)
    (folder / "table.md").write_text(_table(experiment, lines))
    write_json(folder / "results.json", {"title": experiment.title, "lines": [vars(line) for line in lines]})


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
        drawn = chosen(row, runs) or own
        name = named_by(row, drawn, own)
        finished[name], readings[name] = runs, drawn
    if finished:
        draw(experiment.title, finished, folder, readings)
