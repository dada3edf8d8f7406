"""Where the marks of a chart go: pure functions.

Places are in percent of the drawing's width and height (from its top), so that the page can stretch a drawing to any
screen while its text keeps its size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_COLUMNS = 60
"""Columns above which neighbours are averaged: more would be thinner than the gaps between them."""
MOST_HITS = 120


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve; ``dots`` marks its points where they are few. ``kind`` is its class in the style sheet."""

    name: str
    kind: str
    path: str
    dots: str = ""


@dataclass(frozen=True)
class Box:
    """A piece of a column."""

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Hit:
    """An upright strip that tells the numbers at ``at``, a place within it, when pointed at."""

    left: float
    width: float
    at: float
    title: str
    facts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Chart:
    """A drawing: its axes, marks and what they tell; ``legend`` holds (name, kind)."""

    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    boxes: tuple[Box, ...] = ()
    hits: tuple[Hit, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


def line_chart(
    rounds: Sequence[int],
    curve: tuple[str, Sequence[float | None]],
    levels: Sequence[tuple[str, str, float]],
    show: Callable[[float], str],
    mark: Callable[[float], str],
) -> Chart:
    """Return a curve over rounds and the levels it is to be compared with.

    Args:
        rounds: ascending.
        curve: its name and a value for each round; None leaves a gap.
        levels: (name, kind, value).
        show: writes a value.
        mark: writes a value on the axis.
    """
    name, values = curve
    known = [v for v in values if v is not None] + [value for *_, value in levels]
    ticks = nice_ticks(min(known, default=0.0), max(known, default=1.0))
    low, high = ticks[0], ticks[-1]
    span = max(1, rounds[-1] - rounds[0])
    places = [(100 * (r - rounds[0]) / span if len(rounds) > 1 else 50.0) for r in rounds]

    def height(value: float) -> float:
        return round(100 * (high - value) / (high - low), 2)

    path, dots, pen = [], [], "M"
    for x, value in zip(places, values, strict=True):
        if value is None:
            pen = "M"
            continue
        path.append(f"{pen}{x:.2f} {height(value)}")
        dots.append(f"M{x:.2f} {height(value)}h0")
        pen = "L"
    lines = [Line(n, kind, f"M0 {height(value)}H100") for n, kind, value in levels]
    lines.append(Line(name, "own", "".join(path), "".join(dots) if len(dots) <= 40 else ""))
    step = -(-len(rounds) // MOST_HITS)
    hits = []
    for i in range(0, len(rounds), step):
        value = values[i]
        facts = ((name, "own", "–" if value is None else show(value)), *((n, k, show(v)) for n, k, v in levels))
        half = 50 * step / max(1, len(rounds) - 1)
        left, right = max(0.0, places[i] - half), min(100.0, places[i] + half)
        at = 100 * (places[i] - left) / (right - left)
        hits.append(Hit(round(left, 2), round(right - left, 2), round(at, 2), f"round {rounds[i]}", facts))
    return Chart(
        x=_round_ticks(rounds, places),
        y=tuple(Tick(height(t), mark(t)) for t in ticks),
        lines=tuple(lines),
        hits=tuple(hits),
        legend=((name, "own"), *((n, kind) for n, kind, _ in levels)),
    )


def column_chart(
    rounds: Sequence[int],
    layers: Sequence[tuple[str, str, Sequence[float]]],
    show: Callable[[float], str],
    mark: Callable[[float], str],
    top: float | None = None,
) -> Chart:
    """Return stacked columns over rounds; where there are many, a column is the mean of neighbours.

    Args:
        rounds: ascending.
        layers: (name, kind, a value for each round), from the bottom.
        show: writes a value.
        mark: writes a value on the axis.
        top: the axis's end; None: what fits.
    """
    step = -(-len(rounds) // MOST_COLUMNS)
    groups = [range(i, min(i + step, len(rounds))) for i in range(0, len(rounds), step)]
    means = [[sum(values[i] for i in group) / len(group) for *_, values in layers] for group in groups]
    ticks = nice_ticks(0.0, top or max(map(sum, means)) or 1.0)
    high = top or ticks[-1]
    slot = 100 / len(groups)
    width = min(0.72 * slot, 12.0)
    boxes, hits, places = [], [], []
    for number, (group, column) in enumerate(zip(groups, means, strict=True)):
        left, y = slot * number, 100.0
        places.append(left + slot / 2)
        for (_, kind, _), value in zip(layers, column, strict=True):
            tall = 100 * value / high
            y -= tall
            if tall > 0:
                boxes.append(
                    Box(kind, round(left + (slot - width) / 2, 2), round(y, 2), round(width, 2), round(tall, 2))
                )
        first, last = rounds[group[0]], rounds[group[-1]]
        title = f"round {first}" if first == last else f"rounds {first} to {last}, mean"
        facts = tuple((name, kind, show(value)) for (name, kind, _), value in zip(layers, column, strict=True))
        hits.append(Hit(round(left, 2), round(slot, 2), 50.0, title, facts[::-1]))
    starts = [rounds[group[0]] for group in groups]
    kept = tuple(Tick(round(100 * (1 - t / high), 2), mark(t)) for t in ticks if t <= high * 1.0001)
    legend = tuple((name, kind) for name, kind, _ in layers)
    return Chart(_round_ticks(starts, places), kept, (), tuple(boxes), tuple(hits), legend)


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers, evenly spaced, from at or below ``low`` to at or above ``high``."""
    if high - low <= 1e-9 * max(1e-3, abs(low), abs(high)):  # one value to the eye; its digits would run out
        low, high = low - max(abs(low), 1e-9) * 0.05, high + max(abs(high), 1e-9) * 0.05
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _round_ticks(rounds: Sequence[int], places: Sequence[float], wanted: int = 5) -> tuple[Tick, ...]:
    """Label evenly spaced rounds, the last among them."""
    step = max(1, -(-(len(rounds) - 1) // (wanted - 1)))
    return tuple(Tick(round(places[i], 2), str(rounds[i])) for i in range(len(rounds) - 1, -1, -step))
