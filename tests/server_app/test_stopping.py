"""Runs that are asked to stop: what they keep, what they say, and that the next run is not stopped, too."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message

from fedjets_flwr.compare.experiment import Experiment, Row
from fedjets_flwr.compare.lines import failures_of
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.report.page import write_report
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.stopping import Stopped, StopRequest
from tests.support.faults import EIGHT, OneClientANode, Runner, checkpointed

SETTINGS: dict[str, Scalar] = EIGHT | {"run__checkpoint_every": 100}
Event = Callable[[Config, str], None]
"""Something that happens to a run, with its settings and Flower's id of it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("stop"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


@pytest.fixture(scope="module")
def unbroken(run: Runner) -> str:
    run.main(OneClientANode, **SETTINGS | {"run__name": "unbroken"})
    return digest(run.folder / "runs" / "unbroken")


def digest(folder: Path) -> str:
    """Return the hash of the weights of a completed run."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    return str(summary["weights_hash"])


def once(at: int, event: Event) -> type[OneClientANode]:
    """Return a grid on which something happens when the first answer of a round arrives."""

    class Once(OneClientANode):
        happened = False

        def change(self, reply: Message) -> Message:
            if self.server_round == at and not self.happened:
                self.happened = True
                event(Config.from_flat(self.context.run_config), str(self.context.run_id))
            return super().change(reply)

    return Once


def ask(config: Config, run_id: str) -> None:
    StopRequest(config.run_dir, run_id).make()


def ask_and_break(config: Config, run_id: str) -> None:
    ask(config, run_id)
    raise RuntimeError("the clients are gone")


def end_as_flower_does(config: Config, run_id: str) -> None:
    raise SystemExit


def lose_parent(config: Config, run_id: str) -> None:
    os.environ["PARENT"] = "1"


@pytest.mark.parametrize(
    ("event", "error"),
    [(ask, Stopped), (ask_and_break, RuntimeError), (end_as_flower_does, SystemExit), (lose_parent, Stopped)],
)
def test_a_stopped_run_keeps_its_last_finished_round(
    run: Runner, unbroken: str, monkeypatch: pytest.MonkeyPatch, event: Event, error: type[BaseException]
) -> None:
    """And goes on to the weights of an unbroken one, although the request may still lie there."""
    monkeypatch.setenv("PARENT", "99")
    monkeypatch.setattr("fedjets_flwr.runs.stopping.os.getppid", lambda: int(os.environ["PARENT"]))
    own, folder = SETTINGS | {"run__name": event.__name__}, run.folder / "runs" / event.__name__
    with pytest.raises(error):
        run.main(once(5, event), **own)
    gc.collect()  # the lock of the run folder goes with the run's objects
    assert checkpointed(run, event.__name__) == [4]
    recorded = read_recorded(folder)
    assert (recorded.status, len(recorded.records)) == ("stopped", 4)
    run.main(OneClientANode, **own | {"run__resume": True})
    assert digest(folder) == unbroken
    assert read_recorded(folder).status == "completed"


def test_a_run_that_breaks_is_not_called_stopped(run: Runner) -> None:
    """Not even where an older request lies in its folder."""

    def break_(config: Config, run_id: str) -> None:
        ask(config, run_id + "0")
        raise RuntimeError("the clients are gone")

    with pytest.raises(RuntimeError):
        run.main(once(1, break_), **SETTINGS | {"run__name": "broken"})
    recorded = read_recorded(run.folder / "runs" / "broken")
    assert recorded.status == "failed"
    assert recorded.error.endswith("RuntimeError: the clients are gone")


@pytest.fixture(scope="module")
def stopped(run: Runner) -> Config:
    """Return the settings of a run that was stopped in round 3."""
    with pytest.raises(Stopped):
        run.main(once(3, ask), **SETTINGS | {"run__name": "stopped"})
    return Config.from_flat(json.loads((run.folder / "runs" / "stopped" / "config.json").read_text()))


def test_the_report_of_a_stopped_run_says_how_to_go_on(stopped: Config, tmp_path: Path) -> None:
    text = write_report(stopped.run_dir, tmp_path / "report.html").read_text()
    assert "This run was stopped" in text and "fedjets run --resume" in text and "2 of 8 rounds are done" in text
    assert '<p class="status stopped">stopped</p>' in text
    assert "failed" not in text[text.index("<main>") : text.index("</section>")]


def test_a_comparison_does_not_count_a_stopped_run_as_failed(stopped: Config, tmp_path: Path) -> None:
    config = Config.from_flat(stopped.flat() | {"run.output-dir": str(tmp_path)})
    shutil.copytree(stopped.run_dir, config.run_dir)
    experiment = Experiment("title", config.run_dir.parent, ((Row(name="row"), (config,)),))
    assert failures_of(experiment) == []
    error = config.run_dir / "error.json"
    error.write_text(error.read_text().replace('"stopped"', '"failed"'))
    assert failures_of(experiment) == [("row", 1, "stopped; go on with --resume")]
