"""One HTML page about a run: no script, no network, readable on a phone; made from the run's files alone.

Everything that came from a run is hostile text to the page: the templates escape it all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fedjets_flwr.config.schema import settings
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import StrPath, written
from fedjets_flwr.moe.controls import CONTROLS, best_bound, best_control
from fedjets_flwr.report import formatting as page_text
from fedjets_flwr.report.activation import by_domain
from fedjets_flwr.report.charts import Chart, column_chart, line_chart
from fedjets_flwr.report.example_images import Samples, find_samples
from fedjets_flwr.runs.run_folder import Recorded, read_recorded
from fedjets_flwr.runs.score import ACCURACIES, COURSES, course

MOST_FAILURES = 200
UNKNOWN = dict.fromkeys(("strategy", "dataset", "weights_hash", "reading", "serving"), "") | dict.fromkeys(
    (
        "seed",
        "rounds",
        "best_accuracy",
        "best_round",
        "trained_parameters",
        "gate_collapsed",
        "versions",
        "privacy",
        "validation",
    )
)
"""What the templates read of results and an unfinished run, or one of another version, may not tell."""


def _levels(controls: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """Return (name, what it is, kind, accuracy) of the controls that are shown."""
    free = best_control(controls)
    shown = [
        ("common_expert", "common expert", "what every client starts with, alone", "level-common"),
        (free, CONTROLS[free], "the best that unlabelled images make of it, without any training", "level-em"),
        (
            best_bound(controls),
            "classes known",
            "a bound: the common expert, told which classes occur",
            "level-bound",
        ),
    ]
    found = {key: (name, told, kind, controls[key]) for key, name, told, kind in shown if controls.get(key) is not None}
    return list(found.values())


def write_report(folder: StrPath, output: StrPath | None = None) -> Path:
    """Write the page about the run in ``folder`` and return its path.

    Raises:
        FedjetsError: the folder holds no run, or the page cannot be written.
    """
    recorded = read_recorded(folder)
    path = Path(output or recorded.folder / "report.html")
    text = render(recorded, find_samples(recorded))
    try:
        with written(path) as file:
            file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise FedjetsError(f"--output {path}: cannot be written ({error.strerror})") from None
    return path


def render(recorded: Recorded, samples: Samples) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedjets_flwr.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(page_text, name) for name in page_text.__all__}
    r = UNKNOWN | recorded.results
    kind, evaluated = course(recorded.records)
    return environment.get_template("report.html").render(
        run=recorded,
        results=r,
        chosen_settings=_settings(recorded.settings),
        headline=_headline(recorded),
        charts=_charts(recorded),
        scored=COURSES[kind],
        evaluations=[(e["round"], e["loss"], e[kind]["accuracy"]) for e in evaluated],
        experts=_experts(r),
        activation=_activation(r),
        clients=_clients(r),
        participants=_participants(r),
        score=r.get("score"),
        readings=_readings(r),
        cost=_cost(r),
        failures=_failures(recorded.records),
        samples=samples,
    )


def _headline(recorded: Recorded) -> dict[str, Any]:
    """Return the result and its controls as bars, and the gains that the sentence tells."""
    r = recorded.results
    controls = r.get("controls") or {}
    accuracy = r.get("accuracy")
    bars = [("own", r.get("strategy", ""), "this run, last round", accuracy)] if accuracy is not None else []
    bars += [(kind, name, told, value) for name, told, kind, value in _levels(controls)]
    common, free = controls.get("common_expert"), best_control(controls)
    return {
        "accuracy": accuracy,
        "bars": bars,
        "gain": accuracy - common if accuracy is not None and common is not None else None,
        "free": CONTROLS[free],
        "gain_free": accuracy - controls[free] if accuracy is not None and controls.get(free) is not None else None,
        "scored": len(r.get("per_client_accuracy") or {}),
        "last_round": recorded.records[-1]["round"] if recorded.records else 0,
        "rounds": recorded.settings.get("run.rounds"),
    }


def _settings(flat: Mapping[str, Any]) -> dict[str, list[tuple[str, Any, Any, str]]]:
    """Return (key, value, default, meaning) of the settings that differ from their default, and of the others."""
    known = settings()
    rows = [(key, value, *known.get(key, ("", "", ""))[::2]) for key, value in flat.items()]
    return {
        "changed": [row for row in rows if row[1] != row[2]],
        "default": [row for row in rows if row[1] == row[2]],
    }


def _charts(recorded: Recorded) -> dict[str, Chart]:
    """Return the drawings that the records allow, by name."""
    records = recorded.records
    rounds = [record["round"] for record in records]
    whose, evaluated = course(records)
    controls = recorded.results.get("validation_controls" if whose == "validation" else "controls") or {}
    charts = {}
    if evaluated:
        levels = [(name, kind, value) for name, _, kind, value in _levels(controls)]
        at = [record["round"] for record in evaluated]
        accuracy = [record[whose]["accuracy"] for record in evaluated]
        charts["accuracy"] = line_chart(
            at, (str(recorded.results.get("strategy", "")), accuracy), levels, page_text.percent, page_text.percent_mark
        )
        loads = list(zip(*(record[whose]["expert_load"] for record in evaluated), strict=True))
        if len(loads) > 1:
            layers = [(f"expert {m}", page_text.kind(m), load) for m, load in enumerate(loads)]
            charts["load"] = column_chart(at, layers, page_text.percent, page_text.percent_mark, top=1.0)
    scored = [(record["round"], record["score"]) for record in records if "score" in record]
    if recorded.results.get("score") and scored and scored[-1][1]["name"] not in ACCURACIES:
        at, values = [number for number, _ in scored], [score["value"] for _, score in scored]
        # A share reads as percent; any other number as it is.
        kind, mark = (
            (page_text.percent, page_text.percent_mark)
            if all(0 <= value <= 1 for value in values) and scored[-1][1]["better"] == "higher"
            else (page_text.number, page_text.number)
        )
        charts["score"] = line_chart(at, (str(scored[-1][1]["name"]), values), [], kind, mark)
    if any(record["loss"] is not None for record in records):
        losses = [record["loss"] for record in records]
        charts["loss"] = line_chart(rounds, ("training loss", losses), [], page_text.number, page_text.number)
    if records:
        names = (("down", "bytes_down", "c0"), ("up", "bytes_up", "c1"), ("served", "bytes_served", "c2"))
        moved = [(name, kind, [record.get(key, 0) for record in records]) for name, key, kind in names]
        charts["bytes"] = column_chart(rounds, moved, page_text.size, page_text.size)
    return charts


def _experts(r: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of each expert (column) on each class or domain (row), and how the gate routes."""
    table = r.get("expert_class_accuracy") or []
    names = r.get("kinds") or r.get("classes") or [str(i) for i in range(len(table[0]) if table else 0)]
    rows = []
    for name, column in zip(names, zip(*table, strict=True), strict=False):
        best = max((value for value in column if value is not None), default=None)
        rows.append((name, [(value, value == best) for value in column]))
    routing = r.get("routing") or {}
    facts = {"count": len(table), "rows": rows, "of": "domain" if r.get("kinds") else "class"}
    return facts | {name: routing.get(name) for name in ("sample_share", "coverage")}


def _activation(r: Mapping[str, Any]) -> list[list[tuple[str, list[float]]]]:
    """Return, for each layer, (domain, share of tokens of each expert)."""
    rows = [[(name, layer) for layer in table.tolist()] for name, table in by_domain(r).items()]
    return [list(layer) for layer in zip(*rows, strict=True)]


def _clients(r: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each unseen client, those without labels among them."""
    own, common, chosen = (r.get(k) or {} for k in ("per_client_accuracy", "common_expert_per_client", "chosen"))
    kept = {str(client) for client in r.get("kept_common") or ()}
    rows = []
    for client in sorted({*own, *chosen}, key=int):
        accuracy, before = own.get(client), common.get(client)
        rows.append({
            "client": client,
            "accuracy": accuracy,
            "common": before,
            "gain": accuracy - before if accuracy is not None and before is not None else None,
            "experts": chosen.get(client, []),
            "kept": client in kept,
        })  # fmt: skip
    return rows


def _participants(r: Mapping[str, Any]) -> dict[str, Any]:
    """Return the means over clients that train, and (client, own test, all classes) of each, as shares."""
    own = r.get("participants") or {}
    rows = [
        (client, *(counts[kind][0] / counts[kind][1] if kind in counts else None for kind in ("local", "global")))
        for client, counts in (own.get("clients") or {}).items()
    ]
    means = {"local": own.get("local"), "global": own.get("global"), "bits": own.get("bits_per_byte")}
    domains = own.get("domains") or {}
    written = any(told.get("scores") for told in domains.values())
    return {"rows": rows, **means, "tuned": own.get("tuned_bits_per_byte"), "domains": domains, "written": written}


def _readings(r: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of every read-out (row) under every correction (column)."""
    found: dict[str, float] = r.get("readings") or {}
    cells = {name: (*name.split("/"), "")[:3] for name in found}
    priors = list(dict.fromkeys(prior for _, prior, _ in cells.values()))
    rows = dict[str, dict[str, tuple[float | None, bool]]]()
    for name, (out, prior, own) in cells.items():
        row = rows.setdefault(f"{out} + AdaBN" if own else out, dict.fromkeys(priors, (None, False)))
        row[prior] = (found[name], name == r.get("reading"))
    return {"priors": priors, "rows": [(name, list(row.values())) for name, row in rows.items()]}


def _cost(r: Mapping[str, Any]) -> dict[str, Any]:
    """Return totals of bytes and of seconds, the parts of a round beside the whole of it."""
    seconds = dict(r.get("seconds") or {})
    total = seconds.pop("round", 0.0)
    parts = sorted(((name, value, value / total if total else 0.0) for name, value in seconds.items()), key=_by_value)
    kinds = ("bytes_down", "bytes_up", "bytes_served", "wire_bytes", "bytes_setup")
    return {"seconds": total, "parts": parts, "bytes": {kind: r.get(kind) for kind in kinds}}


def _by_value(part: tuple[str, float, float]) -> float:
    return -part[1]


def _failures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return (round, client, reason) of failures, and how many there are in all."""
    rows = [(record["round"], client, reason) for record in records for client, reason in record["failures"].items()]
    return {"rows": rows[:MOST_FAILURES], "count": len(rows), "clients": len({client for _, client, _ in rows})}
