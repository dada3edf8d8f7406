from pathlib import Path

import pytest
import torch

from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.data.clients import open_dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import accuracy_of
from fedjets_flwr.models.device import device_of
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_common_expert_trained_on_a_gpu_is_used_on_a_cpu(tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    expert = pretrain(config("cuda"), print)
    assert torch.cuda.max_memory_allocated() > before
    test = open_dataset(config("cpu")).test
    assert accuracy_of(expert, test.pixels, test.labels) == pytest.approx(expert.accuracy, abs=0.01)
