"""Runs on text of a second: made-up documents of three domains, bytes, and a transformer of a few thousand weights."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import server_app.app
from client_app.runtime import open_runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from tests.support.in_process import Finished, InProcessGrid, run_in_process

DOMAINS = ("sums", "tales", "code")
TEXT_SIZE: dict[str, Scalar] = {
    "data.name": "text-folder", "text.domains": ",".join(DOMAINS), "text.tokens": "bytes", "text.train-tokens": 700,
    "text.val-tokens": 300, "text.test-tokens": 300, "language-model.context": 32, "language-model.width": 32,
    "language-model.heads": 2, "language-model.layers": 3, "language-model.switch-layers": 2,
    "language-model.experts": 4, "language-model.hidden": 128, "language-model.pretrain-steps": 20,
    "language-model.pretrain-batch": 8, "language-model.pretrain-lr": 0.01, "partition.clients": 3,
    "partition.unseen-clients": 1, "partition.anchors": 1, "cohort.anchors": 1, "cohort.normals": 2,
    "cohort.sampling": "uniform", "train.optimizer": "adam", "train.lr": 0.003, "train.batch-size": 8,
    "train.local-steps": 4, "participants.evaluate-every": 1, "run.rounds": 3, "run.checkpoint-every": 1,
    "run.device": "cpu", "transport.name": "inline", "adapt.max-epochs": 2, "adapt.start": "common",
}  # fmt: skip
"""The size of continuous integration."""


def write_domains(folder: Path, seed: int = 1) -> None:
    """Write eighty documents of each domain, which look like nothing in the others."""
    draw = random.Random(seed)
    words = ["king", "river", "stone", "winter", "daughter", "lantern", "forest", "silver", "old", "said", "went"]

    def sums() -> str:
        a, b = draw.randrange(100), draw.randrange(100)
        return f"{a} + {b} = {a + b};"

    def tales() -> str:
        return "the " + " the ".join(draw.choice(words) for _ in range(6)) + "."

    def code() -> str:
        name = draw.choice("abcxyz")
        return f"def {name}({name}):\n    return {name}[{draw.randrange(9)}]"

    for domain, line in zip(DOMAINS, (sums, tales, code), strict=True):
        (folder / domain).mkdir(parents=True)
        for number in range(80):
            (folder / domain / f"{number}.txt").write_text("\n".join(line() for _ in range(20)) + "\n")


Settings = Callable[..., Config]
TextRun = Callable[..., Finished]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three domains."""
    folder = tmp_path_factory.mktemp("text")
    write_domains(folder)
    return folder


def spelled(changes: dict[str, Scalar]) -> dict[str, Scalar]:
    """Return settings by their keys (``moe__top_k=2`` means ``moe.top-k = 2``)."""
    return {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}


@pytest.fixture
def text_settings(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return what makes settings of the small size; they share a cache, with their common expert."""

    def made(**changes: Scalar) -> Config:
        own: dict[str, Scalar] = {
            "data.dir": str(text_folder),
            "run.cache-dir": str(tmp_path_factory.getbasetemp() / "text-cache"),
            "strategy.name": "fedavg",
        }
        return Config.from_flat(TEXT_SIZE | own | spelled(changes))

    return made


def finish_text(factory: pytest.TempPathFactory, **changes: Scalar) -> Path:
    """Return the folder of a run of the small size that is done, for tests of what is made from one."""
    folder = factory.mktemp("finished")
    write_domains(folder / "texts")
    own: dict[str, Scalar] = {"data.dir": str(folder / "texts"), "run.name": "run"}
    flat = TEXT_SIZE | own | spelled(changes)
    open_runtime.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app.app, "draw_or_say", lambda folder, say: None)
        run_in_process(folder, patch, **{k.replace(".", "__", 1): v for k, v in flat.items()}).let_go()
    return folder / "runs" / "run"


@pytest.fixture
def text_run(text_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextRun:
    """Return what does runs of the small size; they leave no plots."""
    return runs_of(text_settings, tmp_path, monkeypatch)


def runs_of(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextRun:
    """Return what does runs below one folder; they leave no plots."""
    monkeypatch.setattr(server_app.app, "draw_or_say", lambda folder, say: None)
    numbers = itertools.count()

    def start(name: str, grid: type[InProcessGrid] = InProcessGrid, /, **changes: Scalar) -> Finished:
        open_runtime.cache_clear()
        config = settings(strategy__name=name, run__name=f"run{next(numbers)}").flat() | spelled(changes)
        del config["run.output-dir"]
        finished = run_in_process(
            tmp_path, monkeypatch, grid, **{k.replace(".", "__", 1): v for k, v in config.items()}
        )
        finished.let_go()
        return finished

    return start
