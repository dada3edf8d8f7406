"""Runs on text to be written for text, of seconds: made-up pairs of three tasks, and a small transformer."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from tests.support.text import TEXT_SIZE, TextRun, runs_of, spelled

TASKS = {"topics": "accuracy", "names": "f1", "sums": "rouge-2"}
"""How each is scored."""
TASK_SIZE: dict[str, Scalar] = TEXT_SIZE | {
    "data.name": "task-folder", "text.domains": ",".join(TASKS), "text.scores": ",".join(TASKS.values()),
    "text.train-pairs": 60, "text.val-pairs": 20, "text.test-pairs": 20, "text.target-tokens": 6, "text.tokens": "bpe",
    "text.vocabulary": 400, "language-model.pretrain-steps": 100, "language-model.pretrain-batch": 16,
    "language-model.pretrain-lr": 0.005,
}  # fmt: skip
"""The size of continuous integration."""


def write_tasks(folder: Path, lines: int = 600) -> None:
    """Write so many pairs of each task."""
    draw = random.Random(1)
    words = {"animal": ["cat", "dog", "cow", "hen", "fox"], "plant": ["oak", "elm", "fir", "ivy", "yew"]}

    def topics() -> tuple[str, str]:
        topic = draw.choice(sorted(words))
        return " ".join(draw.choice(words[topic]) for _ in range(5)), topic

    def names() -> tuple[str, str]:
        name, what = draw.choice(["Tom", "Eve", "Ann", "Bob"]), draw.choice(["cat", "dog", "cow"])
        return f"{name} saw {draw.randrange(100)} {what}s. Who?", name

    def sums() -> tuple[str, str]:
        what, of = draw.choice(["add", "cut", "mix"]), draw.choice("abcdefgh")
        return f"def {what}_{of}({draw.randrange(100)})", f"{what}s a {of}"

    folder.mkdir(parents=True)
    for task, pair in zip(TASKS, (topics, names, sums), strict=True):
        with (folder / f"{task}.jsonl").open("w") as file:
            for _ in range(lines):
                given, target = pair()
                file.write(json.dumps({"task": task, "input": given, "target": target}) + "\n")


Settings = Callable[..., Config]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three tasks."""
    folder = tmp_path_factory.mktemp("tasks") / "data"
    write_tasks(folder)
    return folder


@pytest.fixture
def task_settings(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return what makes settings of the small size; they share a cache, with their language model."""

    def made(**changes: Scalar) -> Config:
        own: dict[str, Scalar] = {
            "data.dir": str(task_folder),
            "run.cache-dir": str(tmp_path_factory.getbasetemp() / "task-cache"),
            "strategy.name": "fedmoe",
        }
        return Config.from_flat(TASK_SIZE | own | spelled(changes))

    return made


@pytest.fixture
def task_run(task_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextRun:
    """Return what does runs of the small size; they leave no plots."""
    return runs_of(task_settings, tmp_path, monkeypatch)
