from pathlib import Path

import pytest
import torch

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import accuracy_of
from fedjets_flwr.models.device import device_of, has_bfloat16, imitates_precision
from fedjets_flwr.models.pretraining import pretrain


def config(device: str, **changes: Scalar) -> Config:
    return Config.from_flat({"run.device": device, "common-expert.target-accuracy": 0.3, **changes})


@pytest.mark.parametrize(
    ("device", "present", "found"),
    [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_where_a_process_computes(monkeypatch: pytest.MonkeyPatch, device: str, present: bool, found: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert device_of(config(device)).type == found


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FedjetsError, match="run.device = 'cuda': PyTorch finds no GPU here; set it to"):
        device_of(config("cuda"))
    with pytest.raises(FedjetsError, match="run.device"):
        pretrain(config("cuda"), print)


@pytest.mark.parametrize(
    ("told", "has"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_whether_a_cpu_has_bfloat16(monkeypatch: pytest.MonkeyPatch, told: dict[str, bool], has: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    assert has_bfloat16() == has


def test_an_older_pytorch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bfloat16()


@pytest.mark.parametrize(
    ("precision", "device", "gpu", "has", "imitates"),
    [
        ("bfloat16", "auto", False, False, True),
        ("bfloat16", "cpu", True, False, True),
        ("float32", "auto", False, False, False),
        ("bfloat16", "auto", False, True, False),
        ("bfloat16", "auto", True, False, False),
        ("bfloat16", "cuda", False, False, False),  # of a GPU that is missing others tell
    ],
)
def test_whether_a_process_imitates_its_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, gpu: bool, has: bool, imitates: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("fedjets_flwr.models.device.has_bfloat16", lambda: has)
    assert imitates_precision(config(device, **{"train.precision": precision})) == imitates


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_common_expert_trained_on_a_gpu_is_used_on_a_cpu(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    expert = pretrain(config("cuda"), print)
    assert torch.cuda.max_memory_allocated() > before
    test = open_dataset(config("cpu")).test
    assert accuracy_of(expert, test.pixels, test.labels) == pytest.approx(expert.accuracy, abs=0.01)
