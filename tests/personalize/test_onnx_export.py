"""The exported graph gives the bundle's answers, for any batch, with every read-out, prior and kind of expert."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.personalize import onnx_export
from fedjets_flwr.personalize.onnx_export import export_onnx
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.trained_run import TrainedRun
from tests.support.audited import told as noted_in
from tests.support.personal import call, finish

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return finish(tmp_path_factory)


@pytest.fixture(scope="module")
def pixels(run: TrainedRun) -> torch.Tensor:
    return open_client(run.config, 8).images.pixels


def answers(path: Path, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    probabilities, experts = session.run(["probabilities", "expert"], {"images": pixels.numpy()})
    return probabilities, experts


def check(made: Personaliser, path: Path, pixels: torch.Tensor) -> None:
    assert export_onnx(made, path, pixels) <= 1e-4
    for batch in (pixels[:1], pixels[:7], pixels):
        wanted = made.predict(batch)
        probabilities, experts = answers(path, batch)
        np.testing.assert_allclose(probabilities, wanted.probabilities.numpy(), atol=1e-4)
        assert experts.tolist() == wanted.experts.tolist()


@pytest.mark.parametrize(
    ("changes", "reading"),
    [
        ({}, "top-1/em"),
        ({"moe__trainable": "stage"}, "blend/em"),
        ({"moe__trainable": "head", "common_expert__embedding": "logits"}, "mixture/none"),
        ({"strategy__name": "ensembles"}, "mean/none"),
    ],
    ids=["all", "stage", "head", "no-gate"],
)
def test_every_kind_of_expert_and_every_reading(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, changes: Any, reading: str
) -> None:
    run = finish(tmp_path_factory, **changes)
    pixels, (read_out, prior) = open_client(run.config, 8).images.pixels, reading.split("/")
    personalise(run, pixels, read_out=read_out, prior=prior).save(tmp_path / "bundle")
    check(Personaliser.load(tmp_path / "bundle"), tmp_path / "model.onnx", pixels)


def test_a_process_that_only_exports_writes_the_same_graph(
    run: TrainedRun, pixels: torch.Tensor, tmp_path: Path
) -> None:
    """Nothing was predicted in it before the graph is traced: what tracing leaves behind must not get into answers."""
    made = personalise(run, pixels)
    made.save(tmp_path / "bundle")
    command = ["from fedjets_flwr.cli.app import main; main()", "export", "bundle", "--onnx", "model.onnx"]
    done = subprocess.run([sys.executable, "-c", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    probabilities, _ = answers(tmp_path / "model.onnx", pixels)
    np.testing.assert_allclose(probabilities, made.predict(pixels).probabilities.numpy(), atol=1e-4)


def test_the_command_writes_a_graph_that_says_what_it_is(
    run: TrainedRun, pixels: torch.Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = personalise(run, pixels)
    made.save(tmp_path / "bundle")
    path = tmp_path / "deep" / "model.onnx"
    monkeypatch.setenv("FEDJETS_AUDIT_LOG", str(tmp_path / "audit.jsonl"))
    assert call(monkeypatch, "export", tmp_path / "bundle", "--onnx", path) == 0
    assert [line["file"] for line in noted_in(tmp_path / "audit.jsonl")] == [str(path)]
    shown = capfd.readouterr()
    assert shown.out.startswith(str(path))
    assert shown.err == ""
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(told["image_shape"]) == [1, 8, 8]
    assert "8 x 8 pixels" in told["preprocessing"]
    (images,) = session.get_inputs()
    assert images.type == "tensor(uint8)"
    assert images.shape[1:] == [1, 8, 8]


def test_a_graph_that_answers_otherwise_is_not_kept(
    run: TrainedRun, pixels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(onnx_export.Graph):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            read, experts = super().forward(images)
            return read * 0.999, experts

    monkeypatch.setattr(onnx_export, "Graph", Wrong)
    with pytest.raises(FedjetsError, match="not written; onnxruntime's probabilities differ from PyTorch's by"):
        export_onnx(personalise(run, pixels), tmp_path / "model.onnx", pixels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnxruntime", "onnxscript"])
def test_a_missing_extra_is_one_line(
    run: TrainedRun, pixels: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FedjetsError, match=rf"--onnx: {name} is not installed; pip install 'fedjets-flwr\[onnx\]'"):
        export_onnx(personalise(run, pixels), tmp_path / "model.onnx")
