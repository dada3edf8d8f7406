"""Pictures of a run, drawn from its result files alone."""

import json
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedjets_flwr.files import StrPath
from fedjets_flwr.moe.controls import CONTROLS, best_bound, best_control
from fedjets_flwr.report.activation import by_domain, holders
from fedjets_flwr.runs.score import ACCURACIES, COURSES, course
from fedjets_flwr.runs.tracking import read_metrics

MOST_NAMED = 40
"""Clients of which a picture tells each by its id."""
_PYPLOT = threading.Lock()
"""Of the one thread that draws: pyplot has one list of figures for all."""


def draw_plots(folder: StrPath) -> list[Path]:
    """Draw every picture that a finished run's files allow into ``plots/`` and return their paths.

    Without a label at any client that is scored nothing was measured, and there is nothing to draw.
    """
    with _PYPLOT:
        return _draw_plots(Path(folder))


def draw_or_say(folder: StrPath, say: Callable[[str], object]) -> None:
    """Draw the pictures of a run; what goes wrong is said, since it must not cost what is done."""
    try:
        draw_plots(folder)
    except Exception as error:
        say(f"no pictures: {type(error).__name__}: {error}; `fedjets report` tries again")


def get_ready() -> None:
    """Import what draws, which takes a second."""
    with _PYPLOT:
        import matplotlib

        matplotlib.use("Agg")
        import seaborn  # noqa: F401


def _draw_plots(folder: Path) -> list[Path]:
    summary = json.loads((folder / "summary.json").read_text())
    score = summary.get("score")  # older runs were judged by accuracy alone
    if summary["accuracy"] is None and score is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import seaborn

    seaborn.set_theme(style="whitegrid", context="notebook")
    records = read_metrics(folder)
    (folder / "plots").mkdir(exist_ok=True)
    pictures: dict[str, Any] = {}
    if summary["accuracy"] is not None:
        pictures |= {
            "accuracy": _accuracy(records, summary),
            "experts": _experts(summary),
            "load": _load(records),
            "clients": _clients(summary),
        }
    if score and score["name"] not in ACCURACIES:
        pictures["score"] = _score(records, summary)
    if summary.get("participants"):
        pictures["participants"] = _participants(summary)
    if by_domain(summary):
        pictures["activation"] = _activation(summary)
    paths = []
    for name, figure in pictures.items():
        path = folder / "plots" / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        paths.append(path)
    matplotlib.pyplot.close("all")
    return paths


def _axes(width: float = 7, height: float = 4) -> Any:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height))


def _accuracy(records: list[dict[str, Any]], summary: Mapping[str, Any]) -> Any:
    figure, axes = _axes()
    kind, evaluated = course(records)
    rounds, accuracies = zip(*((r["round"], r[kind]["accuracy"]) for r in evaluated), strict=True)
    axes.plot(rounds, accuracies, marker="o", color="C0", label=summary["strategy"])
    if kind == "validation":
        axes.plot(rounds[-1], summary["accuracy"], marker="D", color="C1", linestyle="", label="unseen clients")
    draw_controls(axes, summary["validation_controls" if kind == "validation" else "controls"])
    axes.set(
        xlabel="round", ylabel=f"accuracy on {COURSES[kind]}", title=f"{summary['strategy']} on {summary['dataset']}"
    )
    legend_beside(axes)
    return figure


def draw_controls(axes: Any, controls: Mapping[str, float]) -> None:
    """Draw lines across: the common expert, the best that is free, the bound; the same ones in every picture."""
    free = best_control(controls)
    kinds = {
        "common_expert": ("", "black", "--"), free: (" (best free control)", "C3", "-."),
        best_bound(controls): (" (bound)", "C2", ":"),
    }  # fmt: skip
    for name, (role, colour, line) in kinds.items():
        axes.axhline(controls[name], color=colour, linestyle=line, linewidth=1.8, label=CONTROLS[name] + role)


def legend_beside(axes: Any) -> None:
    """Put the legend where it covers no curve."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")


def _experts(summary: Mapping[str, Any]) -> Any:
    import seaborn

    table = np.array(summary["expert_class_accuracy"], dtype=float)
    figure, axes = _axes(max(6, 0.6 * min(table.shape[1], 40) + 2), 0.5 * len(table) + 1.8)
    seaborn.heatmap(
        table, vmin=0, vmax=1, cmap="viridis", annot=table.shape[1] <= 12, fmt=".2f", ax=axes,
        cbar_kws={"label": "accuracy"}, mask=np.isnan(table),
    )  # fmt: skip
    what = "class"
    if kinds := summary.get("kinds"):
        what = "domain"
        axes.set_xticklabels(kinds, rotation=0)
    axes.set(xlabel=what, ylabel="expert", title=f"accuracy of each expert on each {what} (unseen clients)")
    return figure


def _load(records: list[dict[str, Any]]) -> Any:
    figure, axes = _axes()
    kind, evaluated = course(records)
    rounds, loads = [r["round"] for r in evaluated], np.array([r[kind]["expert_load"] for r in evaluated]).T
    if len(rounds) == 1:
        axes.bar([f"expert {m}" for m in range(len(loads))], loads[:, 0])
    else:
        axes.stackplot(rounds, loads, labels=[f"expert {m}" for m in range(len(loads))], alpha=0.85)
        axes.set_xlim(rounds[0], rounds[-1])
        legend_beside(axes)
    axes.set(xlabel="round", ylabel="share of samples", ylim=(0, 1), title=f"who answers {COURSES[kind]}, by round")
    return figure


def _clients(summary: Mapping[str, Any]) -> Any:
    clients = list(summary["per_client_accuracy"])
    figure, axes = _axes(max(6, 0.5 * len(clients) + 3))
    x = np.arange(len(clients))
    axes.bar(
        x - 0.2,
        [summary["common_expert_per_client"].get(c, np.nan) for c in clients],
        0.4,
        color="0.6",
        label="common expert",
    )
    axes.bar(x + 0.2, [summary["per_client_accuracy"][c] for c in clients], 0.4, color="C0", label=summary["strategy"])
    axes.set_xticks(x, clients)
    axes.set(xlabel="unseen client", ylabel="accuracy", ylim=(0, 1), title="each unseen client")
    legend_beside(axes)
    return figure


def _score(records: list[dict[str, Any]], summary: Mapping[str, Any]) -> Any:
    figure, axes = _axes()
    score, scored = summary["score"], [(r["round"], r["score"]["value"]) for r in records if "score" in r]
    axes.plot(*zip(*scored, strict=True), marker="o", color="C0")
    axes.plot(score["best_round"], score["best"], marker="o", color="C3", label=f"best: {score['best']:.4g}")
    axes.set(xlabel="round", ylabel=f"{score['name']} ({score['better']} is better)")
    axes.set_title(f"{summary['strategy']} on {summary['dataset']}")
    legend_beside(axes)
    return figure


def _participants(summary: Mapping[str, Any]) -> Any:
    clients = summary["participants"]["clients"]
    figure, axes = _axes(max(6, 0.35 * len(clients) + 3))
    kinds = {"local": "its own test part", "global": "test images of all classes"}
    shown = [kind for kind in kinds if kind in summary["participants"]]
    x, width = np.arange(len(clients)), 0.8 / len(shown)
    for position, kind in enumerate(shown):
        told = [counts.get(kind) for counts in clients.values()]  # a site may have no test images of all
        values = [counts[0] / counts[1] if counts else math.nan for counts in told]
        place = x + width * (position - (len(shown) - 1) / 2)
        axes.bar(place, values, width, color=("C0", "0.6")[position], label=kinds[kind])
        axes.axhline(summary["participants"][kind], color=("C0", "0.4")[position], linestyle=":", linewidth=1.5)
    axes.set_xticks(x, list(clients), fontsize="x-small", rotation=90 if len(clients) > 40 else 0)
    title = f"clients that train: {summary['strategy']} (dotted: means)"
    axes.set(xlabel="client", ylabel="accuracy", ylim=(0, 1), title=title)
    legend_beside(axes)
    return figure


def _activation(summary: Mapping[str, Any]) -> Any:
    """A row of pictures for each layer: what texts of a domain activate, and who holds what, in its domain's colour."""
    import seaborn
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    shares = by_domain(summary)
    layers, experts = next(iter(shares.values())).shape
    clients = [holder for holder in holders(summary) if holder.fits(layers, experts)]
    names = list(dict.fromkeys([*shares, *(holder.domain for holder in clients)]))
    colours = seaborn.color_palette("husl", len(names))
    width, height = min(8.0, max(3.0, 0.36 * experts)), min(9.0, max(2.2, 0.36 * len(shares), 0.2 * len(clients)))
    figure, grid = pyplot.subplots(
        layers, 2, figsize=(2 * width + 2.6, layers * height + 1.2), squeeze=False, sharex=True, layout="constrained"
    )
    tables = np.stack(list(shares.values()), axis=1)
    named = len(clients) <= MOST_NAMED
    alike: dict[str, Any] = {"cbar": False, "xticklabels": max(1, experts // 16), "linewidths": 0.5 if named else 0}
    for layer, (left, right) in enumerate(grid):
        held = np.zeros((len(clients), experts), dtype=int)
        for row, holder in enumerate(clients):
            held[row, holder.held[layer]] = 1 + names.index(holder.domain)
        seaborn.heatmap(tables[layer], vmin=0, vmax=tables.max(), cmap="Greys", ax=left, yticklabels=shares, **alike)
        seaborn.heatmap(
            held, vmin=0, vmax=len(names), cmap=ListedColormap(["0.94", *colours]), ax=right,
            yticklabels=[holder.client for holder in clients] if named else False, **alike,
        )  # fmt: skip
        for axes, domains in ((left, list(shares)), (right, [holder.domain for holder in clients])):
            for label, domain in zip(axes.get_yticklabels(), domains, strict=False):
                label.set(color=colours[names.index(domain)], fontweight="bold", rotation=0)
            axes.tick_params(length=0)
            axes.tick_params(axis="x", rotation=0)
        right.tick_params(axis="y", labelsize="x-small")
        left.set_ylabel(f"Switch layer {layer}")
        right.set_ylabel("client" if named else "clients, by domain")
    figure.colorbar(grid[0, 0].collections[0], ax=grid[:, 0], label="share of tokens", aspect=30, pad=0.02)
    for axes, text in zip(grid[0], ("what texts of a domain activate", "which experts each client holds"), strict=True):
        axes.set_title(text)
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    return figure
