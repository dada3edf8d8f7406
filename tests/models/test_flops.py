"""Counts against PyTorch's own counter, and in closed form."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedjets_flwr.models.architectures import BUILDERS, AnyArchitecture, Architecture, build
from fedjets_flwr.models.flops import forward_flops
from fedjets_flwr.models.gate import build_gate
from fedjets_flwr.models.transformer import LanguageArchitecture

LANGUAGE = LanguageArchitecture(
    vocabulary=19, context=7, width=8, heads=2, layers=3, switch_layers=2, experts=4, hidden=6
)
MODELS: list[AnyArchitecture] = [*(Architecture(name, 8, "batch", "cifar", 3, 7) for name in BUILDERS), LANGUAGE]


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x @ x.transpose(-1, -2), x)


def oracle(module: nn.Module, sample: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(sample)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("architecture", MODELS, ids=lambda a: getattr(a, "name", "language"))
def test_every_model_costs_what_pytorch_counts(architecture: AnyArchitecture) -> None:
    model = build(architecture, 0)
    images, tokens = torch.randn(2, 3, 32, 32), torch.arange(14).reshape(2, 7)
    sample = images if isinstance(architecture, Architecture) else tokens
    assert forward_flops(model, sample) == oracle(model.eval(), sample) > 0


@pytest.mark.parametrize("module", [build_gate(6, 5, 4, 0), Products()])
def test_every_counted_function_costs_what_pytorch_counts(module: nn.Module) -> None:
    sample = torch.randn(3, 6) if isinstance(module, nn.Sequential) else torch.randn(2, 3, 5, 6)
    assert forward_flops(module, sample) == oracle(module, sample) > 0


def test_a_layer_costs_two_for_every_weight_and_answer_and_its_mode_stays() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).train()
    assert forward_flops(model, torch.zeros(4, 5)) == 2 * 4 * (5 * 3 + 3 * 2)
    assert model.training
    assert model[1].num_batches_tracked == 0
