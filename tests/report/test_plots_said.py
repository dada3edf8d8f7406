"""A picture that cannot be drawn costs no finished run."""

from pathlib import Path

from fedjets_flwr.report.plots import draw_or_say


def test_what_goes_wrong_in_drawing_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "summary.json").write_text("{")
    draw_or_say(tmp_path, said.append)
    assert len(said) == 1
    assert said[0].startswith("no pictures: JSONDecodeError: ")
