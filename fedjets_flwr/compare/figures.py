"""Figures of a comparison."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fedjets_flwr.moe.controls import mean_controls
from fedjets_flwr.report.plots import draw_controls, legend_beside
from fedjets_flwr.runs.score import COURSES, course

Runs = Mapping[str, Sequence[tuple[Any, Sequence[Mapping[str, Any]]]]]


def draw(title: str, rows: Runs, folder: Path, readings: Mapping[str, str]) -> None:
    """Draw accuracy by round, accuracy against bytes, and each expert's accuracy by round where it was measured.

    ``readings``: the read-out by which each row is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    seaborn.set_theme(style="whitegrid", context="notebook")
    pictures = {"participants": _participants(title, rows), "bits-per-byte": _bits_by_round(title, rows)}
    if unseen := {name: runs for name, runs in rows.items() if all(s["accuracy"] is not None for s, _ in runs)}:
        # Rows that only score another row's models have no course.
        trained = {name: runs for name, runs in unseen.items() if all(r[-1]["round"] > 0 for _, r in runs)}
        pictures |= {
            "accuracy": _by_round(title, trained, readings) if trained else None,
            "bytes": _by_bytes(title, trained, readings) if trained else None,
            "experts": _experts(title, unseen),
            "privacy": _by_epsilon(title, unseen),
        }
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    matplotlib.pyplot.close("all")


def _evaluated(records: Sequence[Mapping[str, Any]], reading: str) -> tuple[list[int], list[float], list[float]]:
    """Return rounds, accuracies and bytes moved so far, at the evaluations."""
    moved = list(accumulate(r["bytes_down"] + r["bytes_up"] for r in records))
    kind, _ = course(records)
    at = [i for i, r in enumerate(records) if kind in r]
    return (
        [records[i]["round"] for i in at],
        [records[i][kind]["readings"][reading] for i in at],
        [moved[i] / 1e6 for i in at],
    )


def _axes(title: str, xlabel: str) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    axes.set(title=title, xlabel=xlabel)
    return figure, axes


def _finish(figure: Any, axes: Any, rows: Runs) -> Any:
    kinds = {course(records)[0] for runs in rows.values() for _, records in runs}
    axes.set(ylabel=f"accuracy on {' and '.join(COURSES[kind] for kind in sorted(kinds))}")
    controls = "validation_controls" if kinds == {"validation"} else "controls"
    measured = [(summary["seed"], summary[controls]) for runs in rows.values() for summary, _ in runs]
    distinct = {json.dumps(found, sort_keys=True): found[1] for found in measured}  # rows of all seeds count no more
    draw_controls(axes, mean_controls(list(distinct.values())))
    legend_beside(axes)
    return figure


def _by_round(title: str, rows: Runs, readings: Mapping[str, str]) -> Any:
    figure, axes = _axes(title, "round")
    for number, (name, runs) in enumerate(rows.items()):
        curves = [_evaluated(records, readings[name]) for _, records in runs]
        rounds, values = curves[0][0], np.array([c[1] for c in curves if c[0] == curves[0][0]])
        style = ["-", "--", ":"][number // 10 % 3]
        axes.plot(rounds, values.mean(axis=0), label=name, color=f"C{number % 10}", linestyle=style)
        if len(values) > 1:
            axes.fill_between(rounds, values.min(axis=0), values.max(axis=0), alpha=0.15, color=f"C{number % 10}")
    return _finish(figure, axes, rows)


def _by_bytes(title: str, rows: Runs, readings: Mapping[str, str]) -> Any:
    figure, axes = _axes(title, "MB moved, all clients (log scale)")
    for number, (name, runs) in enumerate(rows.items()):
        curves = [_evaluated(records, readings[name]) for _, records in runs]
        values = np.array([c[1] for c in curves if c[0] == curves[0][0]]).mean(axis=0)
        axes.plot(
            curves[0][2], values, label=name, color=f"C{number % 10}", linestyle=["-", "--", ":"][number // 10 % 3]
        )
    axes.set_xscale("log")
    return _finish(figure, axes, rows)


def _bits_by_round(title: str, rows: Runs) -> Any:
    """Bits per byte by round, of rows on text that were scored on the way; means over seeds."""
    courses = {
        name: found
        for name, runs in rows.items()
        if (found := [course for _, records in runs if (course := bits_course(records))])
    }
    if not any(len(course) > 1 for found in courses.values() for course in found):
        return None
    figure, axes = _axes(title, "round")
    for number, (name, found) in enumerate(courses.items()):
        alike = [course for course in found if [at for at, _ in course] == [at for at, _ in found[0]]]
        values = np.array([[bits for _, bits in course] for course in alike])
        style = {"label": name, "color": f"C{number % 10}", "linestyle": ["-", "--", ":"][number // 10 % 3]}
        axes.plot([at for at, _ in found[0]], values.mean(axis=0), marker=".", **style)
    axes.set(ylabel="bits per byte on clients' own tests (lower is better)")
    legend_beside(axes)
    return figure


def bits_course(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (round, bits per byte) of the rounds that were scored, on text."""
    scored = [(r["round"], r["participants"]) for r in records if "participants" in r]
    return [(server_round, own["bits_per_byte"]) for server_round, own in scored if "bits_per_byte" in own]


def _participants(title: str, rows: Runs) -> Any:
    """Accuracy of clients that train on their own tests and on all classes, a row each; spread over seeds."""
    scored = {n: found for n, runs in rows.items() if (found := [p for s, _ in runs if (p := s.get("participants"))])}
    if not scored:
        return None
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(scored) + 1.8))
    kinds = {"local": "test samples of their own", "global": "test images of all classes"}
    for number, (kind, label) in enumerate(kinds.items()):
        values = [[p[kind] for p in found if kind in p] for found in scored.values()]
        places = [place + 0.2 * (2 * number - 1) for place, of in enumerate(values) if of]
        spread = [np.std(of, ddof=1) if len(of) > 1 else 0.0 for of in values if of]
        axes.barh(
            places, [np.mean(of) for of in values if of], 0.38, xerr=spread, color=("C0", "0.65")[number], label=label
        )
    axes.set_yticks(range(len(scored)), list(scored))
    axes.invert_yaxis()
    axes.set(title=title, xlabel="accuracy of clients that train", xlim=(0, 1))
    legend_beside(axes)
    return figure


def _by_epsilon(title: str, rows: Runs) -> Any:
    """Accuracy against epsilon, a line for each method, and the same method without noise as a level."""
    private: dict[str, list[tuple[float, list[float]]]] = {}
    plain: dict[str, list[float]] = {}
    for runs in rows.values():
        strategy, accuracies = runs[0][0]["strategy"], [summary["accuracy"] for summary, _ in runs]
        if epsilon := epsilon_of(runs[0][0]):
            private.setdefault(strategy, []).append((epsilon, accuracies))
        else:
            plain.setdefault(strategy, accuracies)
    if not private:
        return None
    figure, axes = _axes(title, "epsilon of the client with the largest one (log scale)")
    for number, (strategy, points) in enumerate(private.items()):
        epsilons, values = zip(*sorted(points), strict=True)
        means, spread = [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        axes.errorbar(epsilons, means, yerr=spread, marker="o", capsize=3, color=f"C{number}", label=strategy)
        if strategy in plain:
            axes.axhline(float(np.mean(plain[strategy])), color=f"C{number}", alpha=0.6, label=f"{strategy}, no noise")
    ticks = sorted({epsilon for points in private.values() for epsilon, _ in points})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    return _finish(figure, axes, rows)


def epsilon_of(summary: Mapping[str, Any]) -> float:
    """Return the epsilon of the client with the largest one, for a reader who knows the cohorts; 0 without noise."""
    told = summary.get("privacy") or {}
    return float(max(told.get("epsilon_normal", 0.0), told.get("epsilon_anchor", 0.0)))


def _on_the_same_clients(inspected: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the records that looked at the experts with the samples of those clients with whom the first one did.

    Before the last round these are the validation clients where there are some; they hold other classes.
    """
    return [record for record in inspected if ("evaluation" in record) == ("evaluation" in inspected[0])]


def _experts(title: str, rows: Runs) -> Any:
    """Each expert's mean accuracy over the classes it is best at, by round: a panel for each row that measured it."""
    from matplotlib import pyplot

    measured = {}
    for name, runs in rows.items():
        inspected = _on_the_same_clients([r for r in runs[0][1] if "inspection" in r])
        tables = np.array([r["inspection"]["expert_class_accuracy"] for r in inspected], dtype=float)
        if len(inspected) > 1 and tables.shape[1] > 1:
            measured[name] = ([r["round"] for r in inspected], tables)
    if not measured:
        return None
    columns = min(4, len(measured))
    lines = -(-len(measured) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, (rounds, tables)) in zip(grid.flat, measured.items(), strict=False):
        best = np.nan_to_num(tables[-1], nan=-1).argmax(axis=0)
        for m in range(tables.shape[1]):
            if (best == m).any():
                axes.plot(rounds, np.nanmean(tables[:, m, best == m], axis=1), label=f"expert {m}")
        axes.set_title(name, fontsize="small")
        axes.set_ylim(0, 1)
    for axes in list(grid.flat)[len(measured) :]:
        axes.set_visible(False)
    figure.supxlabel("round")
    figure.supylabel("accuracy on the classes it is best at")
    figure.suptitle(f"each expert: {title}")
    return figure
