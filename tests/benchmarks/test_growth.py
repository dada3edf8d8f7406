"""What the series of `growth` vary, and their picture."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as runner
from benchmarks import growth
from benchmarks.engine import Engine
from benchmarks.growth import OURS, SERIES, STOCK, Growth, Point, draw
from benchmarks.outcome import Plan, Samples
from benchmarks.paced import Stuck
from benchmarks.rivals.stock_app import model_of
from fedjets_flwr.config.schema import Config
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.tasks import open_task

VARIED = {
    "clients": {"partition.clients"},
    "experts": {"moe.experts", "partition.anchors", "cohort.anchors", "cohort.normals"},
    "floats of a model": {"model.width"},
    "clients a round": {"cohort.anchors", "cohort.normals"},
}


def point(series: str, side: str, at: int, seconds: float, server: float) -> Point:
    return Point(series, side, at, Samples((seconds,)), 9.0, server, 500.0)


POINTS = [
    point("clients", OURS, 1_000, 0.1, 800.0),
    point("clients", OURS, 100, 0.2, 700.0),
    point("clients a round", OURS, 5, 0.3, 900.0),
    point("clients a round", STOCK, 5, 0.6, 600.0),
]


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_a_series_varies_one_thing_and_its_settings_are_allowed(series: growth.Series) -> None:
    flats = [Config.from_flat(series.ours(size)).flat() for size in series.sizes]
    assert {key for key in flats[0] if len({flat[key] for flat in flats}) > 1} == VARIED[series.name]
    assert list(series.sizes) == sorted(series.sizes)
    for size in series.sizes:
        changes = series.ours(size)
        open_task(Config.from_flat(changes | {"partition.clients": min(1_000, changes["partition.clients"])})).deal()


def test_clients_a_round_are_as_many_as_the_axis_says_and_ten_beside_experts() -> None:
    for series in SERIES:
        for size in series.sizes:
            cohort = Config.from_flat(series.ours(size)).cohort
            expected = {"clients a round": size, "floats of a model": 2}.get(series.name, 10)
            assert cohort.anchors + cohort.normals == expected


def test_models_are_a_power_of_ten_and_as_large_at_stock_flowers_clients() -> None:
    (series,) = (series for series in SERIES if series.name == "floats of a model")
    for width, power in zip(series.sizes, (5, 6, 7, 8), strict=True):
        assert math.log10(series.at(width)) == pytest.approx(power, abs=0.03)
    assert VectorSpec.of(model_of("move-resnet8", 18)).size == series.at(18)


def test_a_run_that_two_series_share_is_measured_once() -> None:
    assert growth._key(growth.of_clients(1_000)) == growth._key(growth.of_cohort(10))
    assert growth._key(growth.of_clients(1_000)) != growth._key(growth.of_cohort(50))


def test_what_is_too_much_for_stock_flower_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    @contextmanager
    def stuck(folder: Path, *_: object) -> Iterator[Engine]:
        begun.append(folder)
        raise Stuck(f"{folder}/lines.jsonl: 0 of 7 lines after 90 s")
        yield

    monkeypatch.setattr(growth, "stock", stuck)
    series, outcome = SERIES[-1], Growth("growth", "about")
    assert series.stock is not None
    growth._add_stock(Plan(5, False, tmp_path, tmp_path), outcome, series, series.stock)
    assert len(begun) == 1
    assert not outcome.points
    ((what, why),) = outcome.facts.items()
    assert what == "stock Flower, 5 clients a round"
    assert "0 of 7 lines after 90 s" in why
    assert str(tmp_path) not in why


def test_the_picture_has_a_column_for_each_series_and_a_line_for_each_side() -> None:
    figure = draw([p.as_json() for p in POINTS])
    upper, lower = figure.axes[:2], figure.axes[2:]
    assert [axes.get_xlabel() for axes in lower] == ["clients", "clients a round"]
    assert {axes.get_xscale() for axes in figure.axes} | {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert lines_of(upper[0]) == {OURS: [(100, 0.2), (1_000, 0.1)]}
    assert lines_of(lower[0]) == {OURS: [(100, 700.0), (1_000, 800.0)]}
    assert lines_of(upper[1]) == {OURS: [(5, 0.3)], STOCK: [(5, 0.6)]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [OURS, STOCK]


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
    return {name: points for name, points in lines.items() if points}


def test_the_picture_lies_beside_its_numbers_and_the_page_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "measure", lambda plan: Growth("growth", "about", points=POINTS))
    assert runner.main(["growth", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "growth.json").read_text())
    assert [p["at"] for p in written["points"]] == [1_000, 100, 5, 5]
    page = (tmp_path / "README.md").read_text()
    assert "](growth.png)" in page
    assert "| 1,000 clients | fedjets-flwr | 0.1 | 0.1 to 0.1 | 800 | 500 | 9.0 |" in page
