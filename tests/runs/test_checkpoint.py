import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.runs.tracking import Tracker, finite, read_metrics, write_json


def config(tmp_path: Path, **changes: Scalar) -> Config:
    flat: dict[str, Scalar] = {
        "run.output-dir": str(tmp_path),
        "run.name": "r",
        "run.checkpoint-every": 1,
        "run.resume": True,
        "limits.lock-seconds": 0,
    }
    return Config.from_flat(flat | {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()})


def vectors(server_round: int) -> dict[str, Tensor]:
    return {"expert.0": torch.full((3,), float(server_round)), "gate": torch.tensor([0.1, -0.0])}


def record(accuracy: float) -> dict[str, Any]:
    return {"score": {"name": "accuracy", "better": "higher", "value": accuracy}}


def save_rounds(c: Config, *rounds: int) -> None:
    """Save as a process of its own does, whose lock is gone afterwards."""
    checkpoints = Checkpoints(c)
    for server_round in rounds:
        checkpoints.save(server_round, vectors(server_round), {}, False)
    del checkpoints
    gc.collect()


def kept_rounds(c: Config) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (c.run_dir / "checkpoints").glob("round-*"))


def test_the_newest_comes_back_bit_by_bit(tmp_path: Path) -> None:
    c = config(tmp_path)
    save_rounds(c, 1, 2)
    found = Checkpoints(c).newest()
    assert found is not None
    assert found.server_round == found.facts["round"] == 2
    assert set(found.vectors) == set(vectors(2))
    for name, vector in vectors(2).items():
        assert torch.equal(found.vectors[name].view(torch.int32), vector.view(torch.int32))


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert Checkpoints(config(tmp_path)).newest() is None


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    c = config(tmp_path)
    save_rounds(c, 4, 5)
    path = next((c.run_dir / "checkpoints").glob("round-000005-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"truncated": bytes(data[:-4]), "one bit": bytes(data), "empty": b""}[damage])
    found = Checkpoints(c).newest()
    assert found is not None
    assert found.server_round == 4


def test_a_half_written_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    c = config(tmp_path)
    save_rounds(c, 1)
    good = next((c.run_dir / "checkpoints").glob("round-*"))
    (good.parent / f".{good.name.replace('000001', '000002')}.77").write_bytes(good.read_bytes()[:50])
    found = Checkpoints(c).newest()
    assert found is not None
    assert found.server_round == 1


def test_another_configuration_is_refused_by_the_settings_that_differ(tmp_path: Path) -> None:
    save_rounds(config(tmp_path), 1)
    with pytest.raises(FedjetsError) as caught:
        Checkpoints(config(tmp_path, train__lr=0.25, moe__top_k=1)).newest()
    text = str(caught.value)
    assert "train.lr (0.05 -> 0.25)" in text
    assert "moe.top-k (2 -> 1)" in text
    assert "run.seed" not in text
    assert "\n" not in text


def test_more_rounds_may_be_added(tmp_path: Path) -> None:
    save_rounds(config(tmp_path, run__rounds=40), 1)
    found = Checkpoints(config(tmp_path, run__rounds=80, limits__node_seconds=5.0)).newest()
    assert found is not None


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_last_are_kept(tmp_path: Path, keep: int) -> None:
    c = config(tmp_path, run__keep_checkpoints=keep)
    save_rounds(c, *range(1, 6))
    assert kept_rounds(c) == list(range(6 - keep, 6))


def test_resumes_that_fail_at_once_push_no_round_out(tmp_path: Path) -> None:
    """Each writes the round again that it went on from, with other facts beside it."""
    c = config(tmp_path, run__keep_checkpoints=2)
    save_rounds(c, 4, 5)
    for seconds in (50.0, 60.0):
        again = Checkpoints(config(tmp_path, run__keep_checkpoints=2, limits__node_seconds=seconds))
        again.on_broken_off(5, vectors(5))
        del again
        gc.collect()
    assert kept_rounds(c) == [4, 5]


def test_a_damaged_checkpoint_counts_for_no_round(tmp_path: Path) -> None:
    c = config(tmp_path, run__keep_checkpoints=2)
    save_rounds(c, 3, 4)
    path = next((c.run_dir / "checkpoints").glob("round-000004-*"))
    path.write_bytes(path.read_bytes()[:-1])
    save_rounds(c, 5)
    assert kept_rounds(c) == [3, 5]


def test_rounds_that_are_due(tmp_path: Path) -> None:
    c = config(tmp_path, run__checkpoint_every=3, run__keep_checkpoints=9)
    checkpoints = Checkpoints(c)
    for server_round in range(1, 8):
        checkpoints.save(server_round, vectors(server_round), {}, last=server_round == 7)
    assert kept_rounds(c) == [3, 6, 7]


def best_value(c: Config) -> float:
    from safetensors.torch import load_file

    return float(load_file(c.run_dir / "checkpoints" / "best.safetensors")["expert.0"][0])


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    c = config(tmp_path, run__keep_checkpoints=1)
    checkpoints = Checkpoints(c)
    for server_round, accuracy in enumerate([0.3, 0.8, 0.5, 0.8], start=1):
        checkpoints.save(server_round, vectors(server_round), record(accuracy), False)
    assert best_value(c) == 2
    assert kept_rounds(c) == [4]


def test_the_best_of_a_loss_is_the_lowest(tmp_path: Path) -> None:
    c = config(tmp_path)
    checkpoints = Checkpoints(c)
    for server_round, loss in enumerate([2.5, 1.5, 1.75, 1.5], start=1):
        told = {"score": {"name": "bits per byte", "better": "lower", "value": loss}}
        checkpoints.save(server_round, vectors(server_round), told, False)
    assert best_value(c) == 2


def test_a_round_that_was_not_scored_is_never_the_best(tmp_path: Path) -> None:
    c = config(tmp_path)
    Checkpoints(c).save(1, vectors(1), {}, True)
    assert not (c.run_dir / "checkpoints" / "best.safetensors").exists()


def test_a_resumed_run_knows_the_best_so_far(tmp_path: Path) -> None:
    c = config(tmp_path)
    first = Checkpoints(c)
    first.save(1, vectors(1), record(0.8), False)
    del first
    gc.collect()
    second = Checkpoints(c)
    assert second.newest() is not None
    second.save(2, vectors(2), record(0.7), False)
    assert best_value(c) == 1
    second.save(3, vectors(3), record(0.9), False)
    assert best_value(c) == 3


def test_a_run_that_overwrites_does_not_meet_an_older_runs_checkpoints(tmp_path: Path) -> None:
    c = config(tmp_path, run__keep_checkpoints=2)
    save_rounds(c, 30, 40)
    fresh = Checkpoints(config(tmp_path, run__resume=False, run__overwrite=True))
    assert kept_rounds(c) == []
    assert len(list(c.run_dir.glob(".before/checkpoints/round-*"))) == 2  # until there is something in their place
    fresh.save(1, vectors(1), {}, False)
    assert not (c.run_dir / ".before").exists()
    found = fresh.newest()
    assert found is not None
    assert found.server_round == 1


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = Checkpoints(config(tmp_path))
    with pytest.raises(FedjetsError, match=r"run\.name"):
        Checkpoints(config(tmp_path))
    assert Checkpoints(config(tmp_path, run__name="other")).newest() is None
    assert first.newest() is None


def round_record(server_round: int, loss: float = 1.0) -> dict[str, Any]:
    return {"round": server_round, "loss": loss, "seconds": {"train": 0.5}}


def test_cut_back_keeps_what_the_checkpoint_holds(tmp_path: Path) -> None:
    tracker = Tracker(config(tmp_path))
    for server_round in range(1, 6):
        tracker.on_round(round_record(server_round), {})
    tracker.cut_back(3)
    tracker.on_round(round_record(4, 2.0), {})
    found = read_metrics(tracker.folder)
    assert [(r["round"], r["loss"]) for r in found] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    tracker.cut_back(0)
    assert read_metrics(tracker.folder) == []


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    tracker = Tracker(config(tmp_path))
    tracker.on_round(round_record(1), {})
    with (tracker.folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "lo')
    assert [r["round"] for r in read_metrics(tracker.folder)] == [1]
    tracker.cut_back(5)
    tracker.on_round(round_record(2), {})
    assert [r["round"] for r in read_metrics(tracker.folder)] == [1, 2]


def test_the_settings_of_a_run_are_written(tmp_path: Path) -> None:
    c = config(tmp_path)
    assert Config.from_flat(json.loads((Tracker(c).folder / "config.json").read_text())) == c


def refuse(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_json_never_holds_nan(tmp_path: Path) -> None:
    tracker = Tracker(config(tmp_path))
    tracker.on_round(round_record(1, math.nan) | {"nested": {"a": [math.inf, (1.0, -math.inf)]}}, {})
    line = json.loads((tracker.folder / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["nested"] == {"a": [None, [1.0, None]]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": math.nan})
    assert not (tmp_path / "a.json").exists()


def test_finite_leaves_the_rest_alone() -> None:
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": 0.0}}
    assert finite(value) == value
