"""Which key may speak for which client."""

import json
from pathlib import Path

from fedjets_flwr.wire.binding import Binding


def test_without_a_roster_the_first_key_keeps_its_client_over_a_resume(tmp_path: Path) -> None:
    pins = tmp_path / "pins.json"
    assert Binding(None, pins).refusal("liar", [3]) == ""
    again = Binding(None, pins, resume=True)
    assert "another key had before" in again.refusal("site 3", [3])
    assert again.refusal("liar", [3]) == ""


def test_a_roster_decides_whoever_was_first_before_it(tmp_path: Path) -> None:
    pins = tmp_path / "pins.json"
    assert Binding(None, pins).refusal("liar", [3]) == ""
    bound = Binding({"site 3": 3}, pins, resume=True)
    assert "nodes.roster does not give to its key" in bound.refusal("liar", [3])
    assert bound.refusal("site 3", [3]) == ""
    assert json.loads(pins.read_text()) == {"3": "site 3"}
