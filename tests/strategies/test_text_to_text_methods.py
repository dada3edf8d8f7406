"""Methods on text to be written for text: whole runs on three small tasks."""

import json
from typing import Any

import pytest

from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.in_process import Finished, InProcessGrid
from tests.support.tasks import TASKS, task_folder, task_run, task_settings
from tests.support.text import TextRun

__all__ = ["task_folder", "task_run", "task_settings"]


def domains(run: Finished) -> list[dict[str, Any]]:
    return [record["participants"]["domains"] for record in read_metrics(run.config.run_dir)]


def test_fedmoe_learns_to_write_what_is_asked_for(task_run: TextRun) -> None:
    """Of two topics each is as likely; after three rounds nearly every test is right."""
    done = task_run("fedmoe", train__local_steps=20)
    first, *_, last = domains(done)
    assert all(last[task]["bits_per_byte"] < first[task]["bits_per_byte"] for task in TASKS)
    assert last["topics"]["scores"]["accuracy"] > 0.9
    assert {task: set(told["scores"]) for task, told in last.items()} == {
        "topics": {"accuracy"}, "names": {"f1", "exact-match"}, "sums": {"rouge-2"},
    }  # fmt: skip
    told = json.loads((done.config.run_dir / "summary.json").read_text())
    assert told["participants"]["domains"] == last
    assert told["participants"]["scores"]["0"] == last["topics"]["scores"]
    assert told["kinds"] == list(TASKS)
    assert read_recorded(done.config.run_dir).results["participants"]["domains"] == last


@pytest.mark.parametrize("method", ["fedavg", "randommoe", "finetune", "local"])
def test_other_methods_write_with_the_model_that_they_adapt(method: str, task_run: TextRun) -> None:
    done = task_run(method, run__rounds=1)
    (only,) = domains(done)
    assert all(0 <= value <= 1 for task in TASKS for value in only[task]["scores"].values())


@pytest.mark.parametrize("changed", [1.5, -0.1, float("nan"), None])
def test_a_score_that_is_none_is_refused(changed: float | None, task_run: TextRun) -> None:
    class Lies(InProcessGrid):
        def change(self, reply: Any) -> Any:
            if reply.metadata.message_type == "evaluate.fedmoe":
                numbers = reply.content["client.1"]
                if changed is None:
                    del numbers["f1"]
                else:
                    numbers["f1"] = changed
            return reply

    done = task_run("fedmoe", Lies, run__rounds=1, limits__max_failure_share=0.9)
    (record,) = read_metrics(done.config.run_dir)
    assert "f1" in record["failures"]["1"]
    assert set(record["participants"]["domains"]) == {"topics", "sums"}


def test_a_round_has_a_client_of_each_task_and_models_are_tuned_at_last(task_run: TextRun) -> None:
    done = task_run(
        "fedmoe",
        cohort__sampling="one-per-domain",
        partition__clients=6,
        text__train_pairs=40,
        participants__tuned=True,
        run__rounds=2,
    )
    first, last = read_metrics(done.config.run_dir)
    assert all(sorted(client % 3 for client in record["cohort"]) == [0, 1, 2] for record in (first, last))
    assert "tuned_bits_per_byte" not in first["participants"]
    assert 0 < last["participants"]["tuned_bits_per_byte"] < last["participants"]["bits_per_byte"]
