"""Results that lie in a folder are lost to no run that did not ask for it."""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.app import Error, Message

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.claim import BEFORE, LEDGER, claimed, holds_results, make_room, put_back
from fedjets_flwr.runs.remote_log import MARK
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.faults import EIGHT, OneClientANode, Runner, checkpointed


def config(folder: Path, name: str = "", **changes: Scalar) -> Config:
    flat: dict[str, Scalar] = {"run.output-dir": str(folder), "run.name": name}
    return Config.from_flat(flat | {f"run.{key}": value for key, value in changes.items()})


def finished(config: Config) -> Config:
    """Do as if the run were done."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "summary.json").write_text(json.dumps({"status": "completed"}))
    return config


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_name_that_holds_results_is_refused_by_one_line_with_all_ways_out(tmp_path: Path) -> None:
    finished(config(tmp_path, "mine"))
    with pytest.raises(FedjetsError, match=r"run\.name = 'mine'.*--resume.*another name.*--overwrite") as caught:
        claimed(config(tmp_path, "mine"))
    assert "\n" not in str(caught.value)
    for way in ("resume", "overwrite"):
        assert claimed(config(tmp_path, "mine", **{way: True})).run_name == "mine"


@pytest.mark.parametrize("left", ["metrics.jsonl", "summary.json", "checkpoints/round-000001-0.safetensors"])
def test_whatever_a_run_left_counts_as_results(tmp_path: Path, left: str) -> None:
    path = tmp_path / "mine" / left
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(FedjetsError, match="holds results"):
        claimed(config(tmp_path, "mine"))


def test_a_run_that_failed_before_its_first_round_may_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    for name in ("error.json", "config.json", "progress.json", "flower.log"):
        (tmp_path / "mine" / name).write_text("{}")
    (tmp_path / "mine" / "metrics.jsonl").write_text("")
    assert claimed(config(tmp_path, "mine")).run_name == "mine"


def test_runs_without_a_name_lie_side_by_side(tmp_path: Path) -> None:
    base = config(tmp_path).run_name
    names = [finished(claimed(config(tmp_path))).run.name for _ in range(3)]
    assert names == [base, f"{base}-2", f"{base}-3"]
    assert claimed(config(tmp_path, resume=True)).run.name == names[-1]
    assert claimed(config(tmp_path, overwrite=True)).run.name == names[-1]


def test_the_newest_without_a_name_is_found_where_older_ones_are_gone(tmp_path: Path) -> None:
    base = config(tmp_path).run_name
    for name in (f"{base}-2", f"{base}-10", f"{base}-1", f"{base}-02", f"{base}-x", "other"):
        finished(config(tmp_path, name))
    (tmp_path / f"{base}-11").mkdir()
    assert claimed(config(tmp_path, resume=True)).run.name == f"{base}-10"
    assert claimed(config(tmp_path)).run.name == f"{base}-11"


def test_a_numbered_run_goes_on_counting_what_the_one_before_let_out(tmp_path: Path) -> None:
    """They train on the same clients."""
    first, second = finished(config(tmp_path)), claimed(config(tmp_path))
    (first.run_dir / LEDGER).write_text("spent\n")
    second.run_dir.mkdir()
    make_room(second)
    assert (second.run_dir / LEDGER).read_text() == "spent\n"


@pytest.fixture
def over(tmp_path: Path) -> Config:
    """A finished run with a checkpoint, and the settings of one that overwrites it."""
    over = finished(config(tmp_path, "mine", overwrite=True))
    (over.run_dir / LEDGER).write_text("spent\n")
    (over.run_dir / "checkpoints").mkdir()
    (over.run_dir / "checkpoints" / "round-000001-0.safetensors").write_text("old")
    return over


def test_what_is_overwritten_is_moved_aside_but_not_what_was_let_out(over: Config) -> None:
    before = bytes_of(over.run_dir)
    make_room(over)
    assert sorted(path.name for path in over.run_dir.iterdir()) == [BEFORE, LEDGER]
    assert bytes_of(over.run_dir / BEFORE) == {name: text for name, text in before.items() if name != LEDGER}


def test_a_second_run_that_overwrites_drops_what_came_to_nothing_and_nothing_else(over: Config) -> None:
    before = bytes_of(over.run_dir)
    for _ in range(2):
        make_room(over)
        for name in ("metrics.jsonl", "summary.json"):
            (over.run_dir / name).write_text("new")
    put_back(over.run_dir)
    assert bytes_of(over.run_dir) == before | {"metrics.jsonl": b"new"}


@contextmanager
def killed_after(moves: int) -> Iterator[None]:
    """Let nothing but so many moves happen."""
    left, rename = iter(range(moves)), Path.rename

    def move(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return rename(path, target)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(Path, "rename", move)
        yield


@pytest.mark.parametrize("moves", [0, 1])
def test_moving_that_was_cut_off_on_the_way_loses_nothing(over: Config, moves: int) -> None:
    before = bytes_of(over.run_dir)
    with killed_after(moves):
        make_room(over)
    put_back(over.run_dir)
    assert bytes_of(over.run_dir) == before
    make_room(over)
    with killed_after(moves):
        put_back(over.run_dir)
    assert holds_results(over.run_dir)
    put_back(over.run_dir)
    assert bytes_of(over.run_dir) == before


def test_what_was_moved_aside_stays_in_the_way_of_other_runs_until_it_is_back(over: Config) -> None:
    before = bytes_of(over.run_dir)
    make_room(over)
    with pytest.raises(FedjetsError, match="holds results"):
        claimed(config(over.run_dir.parent, "mine"))
    make_room(config(over.run_dir.parent, "mine", resume=True))
    assert bytes_of(over.run_dir) == before


# Through the ServerApp, as `flwr run .` starts it ---------------------------------------------------------------------

TINY_RUN: dict[str, Scalar] = EIGHT | {"run__rounds": 2, "run__evaluate_every": 2, "strategy__name": "fedavg"}


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path, tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


def start(run: Runner, **changes: Scalar) -> None:
    try:
        run.main(OneClientANode, **TINY_RUN | changes)
    finally:
        gc.collect()  # the lock goes with the run's objects


def test_the_server_refuses_a_name_that_holds_results_and_changes_nothing(
    run: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher on another machine hears why."""
    start(run, run__name="mine")
    before = bytes_of(run.folder / "runs" / "mine")
    capsys.readouterr()
    with pytest.raises(FedjetsError, match="holds results"):
        start(run, run__name="mine")
    assert re.search(rf"^{MARK} .*error\.json.*holds results", capsys.readouterr().out)
    assert bytes_of(run.folder / "runs" / "mine") == before


def test_the_server_gives_runs_without_a_name_folders_of_their_own(run: Runner) -> None:
    for _ in range(2):
        start(run, run__name="")
    first, second = sorted((run.folder / "runs").iterdir())
    assert second.name == f"{first.name}-2"
    assert (first / "summary.json").is_file() and (second / "summary.json").is_file()


def test_a_resume_that_is_refused_leaves_a_finished_run_finished(run: Runner) -> None:
    start(run, run__name="mine")
    folder = run.folder / "runs" / "mine"
    before = bytes_of(folder)
    with pytest.raises(FedjetsError, match=r"another configuration: train\.lr \(0\.05 -> 0\.01\); set"):
        start(run, run__name="mine", run__resume=True, train__lr=0.01)
    changed = {name for name, text in bytes_of(folder).items() if before.get(name) != text}
    assert changed == {"progress.json", "error.json", "audit.jsonl", "audit.jsonl.head"}
    assert read_recorded(folder).status == "completed"


def test_an_overwriting_run_that_fails_before_its_first_checkpoint_loses_nothing(run: Runner) -> None:
    start(run, run__name="mine")
    folder = run.folder / "runs" / "mine"
    before = bytes_of(folder)
    with pytest.raises(FedjetsError, match=r"common-expert\.path"):
        start(run, run__name="mine", run__overwrite=True, common_expert__path="/nowhere")
    after = bytes_of(folder)
    assert "/nowhere" in after.pop("error.json").decode()
    assert goes_on(after, before)
    start(run, run__name="mine", run__overwrite=True, run__rounds=1)
    assert not (folder / BEFORE).exists()
    assert [record["round"] for record in read_metrics(folder)] == [1]
    assert checkpointed(run, "mine") == [1]
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"


def test_an_overwriting_run_whose_first_round_fails_loses_nothing(run: Runner) -> None:
    """It has no round of its own to keep; what it began from is no result."""

    class Fails(OneClientANode):
        def answer(self, message: Message) -> Message:
            if message.metadata.message_type.startswith("train"):
                return Message(Error(1, "it broke"), reply_to=message)
            return super().answer(message)

    start(run, run__name="mine")
    folder = run.folder / "runs" / "mine"
    before = bytes_of(folder)
    with pytest.raises(FedjetsError, match="clients failed, more than limits.max-failure-share"):
        run.main(Fails, **TINY_RUN | {"run__name": "mine", "run__overwrite": True})
    gc.collect()
    after = bytes_of(folder)
    assert "clients failed" in after.pop("error.json").decode()
    assert goes_on(after, before)


def goes_on(after: dict[str, bytes], before: dict[str, bytes]) -> bool:
    """Return whether files are as they were, but for the audit log, which tells what was done since."""
    logs = [files.pop("audit.jsonl", b"") for files in (before, after)]
    for files in (before, after):
        files.pop("audit.jsonl.head", None)
    return after == before and logs[1].startswith(logs[0])
