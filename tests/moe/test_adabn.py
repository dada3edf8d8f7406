"""AdaBN by hand, on a model of one batch norm."""

import pytest
import torch
from torch import Tensor, nn

from fedjets_flwr.moe import adabn
from fedjets_flwr.moe.adabn import adapt_batch_norm

SAMPLES = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 40.0], [6.0, 40.0]])


@pytest.fixture
def model() -> nn.Sequential:
    norm = nn.BatchNorm1d(2, affine=False)
    norm.running_mean = torch.tensor([100.0, -100.0])
    return nn.Sequential(norm).eval()


def test_the_statistics_become_the_samples_own_and_the_answers_with_them(model: nn.Sequential) -> None:
    adapt_batch_norm(model, SAMPLES.__getitem__, 4)
    norm = model[0]
    assert norm.running_mean.tolist() == pytest.approx([3.0, 25.0])
    assert norm.running_var.tolist() == pytest.approx([20 / 3, 300.0])  # unbiased, as batch norm keeps it
    assert not model.training
    assert norm.momentum == 0.1
    found: Tensor = model(SAMPLES[:1])
    assert found[0].tolist() == pytest.approx([-3 / (20 / 3) ** 0.5, -15 / 300**0.5], rel=1e-4)


def test_more_samples_than_a_batch_holds_count_by_batches_of_one_size(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adabn, "BATCH", 3)
    adapt_batch_norm(model, SAMPLES.__getitem__, 4)
    assert model[0].running_mean.tolist() == pytest.approx([3.0, 25.0])
    assert model[0].running_var.tolist() == pytest.approx([2.0, 0.0])  # within the batches {0, 1} and {2, 3}


def test_weights_and_models_without_batch_norm_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt_batch_norm(model, SAMPLES.__getitem__, 4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training


def test_one_sample_has_no_statistics(model: nn.Sequential) -> None:
    adapt_batch_norm(model, SAMPLES.__getitem__, 1)
    assert model[0].running_mean.tolist() == [100.0, -100.0]
