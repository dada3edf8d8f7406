"""What a site that never trained is handed: its model is that of the run, and little is told of others."""

import json
from pathlib import Path

import pytest
import safetensors
import torch

from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.personalize.hand_out import hand_out
from fedjets_flwr.personalize.personaliser import personalise
from fedjets_flwr.runs.trained_run import TrainedRun, open_run
from tests.support.personal import call, finish

UNSEEN = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return finish(tmp_path_factory, run__seed=4321)


@pytest.mark.parametrize("read_out", ["", "familiar"])
def test_its_models_are_those_of_the_run(
    run: TrainedRun, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, read_out: str
) -> None:
    if read_out:
        run = finish(tmp_path_factory, personalize__read_out=read_out, partition__public_share=0.3)
    hand_out(run.folder, tmp_path / "given")
    images = open_client(run.config, UNSEEN).images.pixels
    ours, theirs = (personalise(found, images) for found in (run, open_run(tmp_path / "given")))
    assert ours.card.experts == theirs.card.experts
    assert ours.predictions is not None and theirs.predictions is not None
    assert torch.equal(ours.predictions.probabilities, theirs.predictions.probabilities)


def test_it_tells_nothing_of_other_clients_and_of_the_server(run: TrainedRun, tmp_path: Path) -> None:
    hand_out(run.folder, tmp_path / "given")
    files = {path.relative_to(tmp_path / "given").as_posix(): path for path in (tmp_path / "given").rglob("*.*")}
    (checkpoint,) = [name for name in files if name.startswith("checkpoints/")]
    assert set(files) == {"config.json", "summary.json", "common-expert.safetensors", checkpoint}
    summary = json.loads(files["summary.json"].read_text())
    assert set(summary) == {"dataset", "rounds", "weights_hash", "classes", "image_shape", "serving", "usual"}
    assert summary["usual"] == {}
    texts = {name: path.read_bytes() for name, path in files.items()}
    for word in (str(run.folder.parent), "4321", "run.seed", "per_client", "chosen", "anchors"):
        assert not any(word.encode() in text for name, text in texts.items() if name != "config.json"), word
    settings = json.loads(texts["config.json"])
    assert "run.seed" not in settings
    assert not any("/" in str(value) for value in settings.values())
    with safetensors.safe_open(files[checkpoint], "pt") as file:
        assert not file.metadata()


def test_the_command_writes_it_once(
    run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("hand-out", "--run", run.folder, "--output", tmp_path / "given")
    assert call(monkeypatch, *words, "--audit-log", tmp_path / "audit.jsonl") == 0
    assert "MB), for fedjets personalize --run" in capsys.readouterr().out
    assert run.summary["weights_hash"] in (tmp_path / "audit.jsonl").read_text()
    assert call(monkeypatch, *words) == 1
    assert "there is something already" in capsys.readouterr().err


def test_what_is_no_finished_run_is_handed_to_nobody(run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedjetsError, match="is no finished run"):
        hand_out(tmp_path / "empty", tmp_path / "given")
    assert not (tmp_path / "given").exists()
