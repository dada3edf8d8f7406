"""What is shown of runs, at a terminal and elsewhere."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedjets_flwr.config.schema import Config
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.follow import follow
from fedjets_flwr.launch.superlink import Launched, SuperLink


def record(number: int, **more: object) -> dict[str, Any]:
    return {"round": number, "loss": 2.0 / number, **more}


RECORDS = [record(1, evaluation={"accuracy": 0.5}), record(2), record(3, evaluation={"accuracy": 0.75})]
ENDS = ["round 1/3 loss 2.000, unseen clients 0.500", "round 3/3 loss 0.667, unseen clients 0.750"]


class Told(Launched):
    """A run whose files were looked at five times."""

    def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for text in ("starting Flower", "training [/]", "training [/]"):
            yield text, []
        yield "training [/]", RECORDS[:1]
        yield "training [/]", RECORDS


def shown(at_once: int, at_terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=at_terminal, width=200, markup=False)
    config = Config.from_flat({"run.name": "mine", "run.rounds": 3})
    with Display(console, at_once) as display, display.bar("runs", 9, 4, "about 5 minutes left"):
        follow(Told(SuperLink(), "1", Path()), config, display)
        assert [task.description for task in display.tasks] == ["runs"]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).replace("\r", "\n")


@pytest.mark.parametrize(("at_once", "before"), [(1, ""), (2, "mine: ")])
def test_lines_tell_what_a_bar_would_show(at_once: int, before: str) -> None:
    lines = ["starting Flower", "training [/]", *ENDS]
    assert shown(at_once, at_terminal=False).strip().splitlines() == [f"{before}{line}" for line in lines]


@pytest.mark.parametrize(("at_once", "before"), [(1, ""), (2, "mine: ")])
def test_a_bar_at_a_terminal_leaves_its_last_line(at_once: int, before: str) -> None:
    output = shown(at_once, at_terminal=True)
    lines = [line.strip() for line in output.splitlines()]
    assert f"{before}{ENDS[-1]}" in lines
    assert not any(ENDS[0] in line for line in lines)
    assert any(re.search(r"runs .* 4/9 about 5 minutes left", line) for line in lines)


@pytest.mark.parametrize("at_terminal", [True, False])
def test_a_warning_is_told_once_as_soon_as_it_comes(tmp_path: Path, at_terminal: bool) -> None:
    class Warns(Told):
        def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
            for number, found in enumerate(super().watch()):
                warnings = ["slow [/]\x1b[31m", "wrong"][: max(0, number - 1)]
                (self.folder / "progress.json").write_text(json.dumps({"text": "", "warnings": warnings}))
                yield found

    output = io.StringIO()
    console = Console(file=output, force_terminal=at_terminal, width=200, markup=False)
    with Display(console) as display:
        follow(Warns(SuperLink(), "1", tmp_path), Config.from_flat({"run.name": "mine", "run.rounds": 3}), display)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue()).replace("\r", "\n").splitlines()
    told = [line.strip() for line in lines if line.startswith("warning: ")]
    assert len(told) == 2
    assert told[0].startswith("warning: slow [/]")
    assert told[1] == "warning: wrong"
    assert "\x1b[31m" not in output.getvalue()
