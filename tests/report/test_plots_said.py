"""A picture that cannot be drawn costs no finished run."""

from pathlib import Path

import pytest

from fedjets_flwr.report.plots import _participants, draw_or_say


def test_what_goes_wrong_in_drawing_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "summary.json").write_text("{")
    draw_or_say(tmp_path, said.append)
    assert len(said) == 1
    assert said[0].startswith("no pictures: JSONDecodeError: ")


@pytest.mark.parametrize("told", [{"local": (3, 4), "global": (1, 2)}, {"local": (3, 4)}])
def test_a_site_without_the_test_images_of_all_has_no_bar_for_them(told: dict[str, tuple[int, int]]) -> None:
    clients = {"0": {"local": (1, 2), "global": (1, 4)}, "1": told}
    summary = {"strategy": "fedavg", "participants": {"clients": clients, "local": 0.6, "global": 0.3}}
    bars = [patch.get_height() for patch in _participants(summary).axes[0].patches]
    assert bars[:3] == [0.5, 0.75, 0.25]
    assert bars[3] == 0.5 if "global" in told else bars[3] != bars[3]
