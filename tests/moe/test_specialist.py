"""The mixture of specialist and generalist in closed form (Listo Zec et al. 2020, section 3)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Sgd
from fedjets_flwr.moe.specialist import MIXES, TRAINED, SpecialistMixture, log_mixture, mixed_logs, silent

PIXELS, FEATURES, CLASSES = 6, 5, 4


def logs(seed: int, rows: int = 7) -> Tensor:
    return (3 * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))).log_softmax(dim=1)


def model(seed: int, outputs: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(seed)
    stages = nn.Linear(PIXELS, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(), nn.Linear(FEATURES, outputs)
    return nn.Sequential(*stages)


def mixture(mix: str = "probs", trains: str = "gate+local", gate: nn.Module | None = None) -> SpecialistMixture:
    return SpecialistMixture(gate or silent(model(3, 1)), model(1), model(2), MIXES[mix], TRAINED[trains])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(9, PIXELS, generator=generator), torch.randint(CLASSES, (9,), generator=generator)


@given(st.floats(-15, 15), st.integers(0, 1000))
def test_the_mixture_is_that_of_the_probabilities(gate_logit: float, seed: int) -> None:
    local, shared = logs(seed), logs(seed + 1)
    share = torch.sigmoid(torch.tensor(gate_logit)).double()
    wanted = share * local.double().exp() + (1 - share) * shared.double().exp()
    found = log_mixture(torch.full((7, 1), gate_logit), local, shared)
    torch.testing.assert_close(found.exp().double(), wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(7))


@pytest.mark.parametrize("mix", MIXES)
def test_a_sure_gate_lets_one_answer_alone_and_equal_models_answer_as_either(mix: str) -> None:
    local, shared = logs(1), logs(2)
    for logit, alone in ((40.0, local), (-40.0, shared)):
        torch.testing.assert_close(MIXES[mix](torch.full((7, 1), logit), local, shared), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(MIXES[mix](torch.zeros(7, 1), local, local), local)


@given(st.floats(-15, 15), st.integers(0, 1000))
def test_mixing_logs_is_an_upper_bound_of_the_loss(gate_logit: float, seed: int) -> None:
    gate, local, shared = torch.full((7, 1), gate_logit), logs(seed), logs(seed + 1)
    assert bool((mixed_logs(gate, local, shared) <= log_mixture(gate, local, shared) + 1e-5).all())


def test_a_silent_gate_mixes_half_and_half() -> None:
    x, _ = batch()
    mixed = mixture().eval()
    assert torch.equal(mixed.shares(x), torch.full((9,), 0.5))
    wanted = (mixed.local(x).softmax(1) + mixed.shared(x).softmax(1)) / 2
    torch.testing.assert_close(mixed(x).exp(), wanted)


def test_a_gate_of_one_unit_reads_the_generalists_features() -> None:
    x, _ = batch()
    unit = nn.Linear(FEATURES, 1)
    mixed = mixture(gate=unit).eval()
    logit = unit(mixed.shared[:-1](x))
    torch.testing.assert_close(mixed.shares(x), logit.sigmoid().squeeze(1))
    wanted = log_mixture(logit, mixed.local(x).log_softmax(1), mixed.shared(x).log_softmax(1))
    torch.testing.assert_close(mixed(x), wanted)


@pytest.mark.parametrize("trains", TRAINED)
def test_only_what_is_trained_moves(trains: str) -> None:
    """Weights and running statistics alike."""
    x, y = batch()
    mixed = mixture(trains=trains)
    flat = FlatModel(mixed)
    before = {name: tensor.clone() for name, tensor in mixed.state_dict().items()}
    optimizer = Sgd(flat, 0.5)
    for _ in range(2):  # a silent gate's lower layers learn once its last one speaks
        mixed.train()
        assert {name for name, part in mixed.named_children() if part.training} == set(TRAINED[trains])
        flat.zero_grad()
        F.nll_loss(mixed(x), y).backward()
        optimizer.step()
    after = mixed.state_dict()
    moved = {name.partition(".")[0] for name, old in before.items() if not torch.equal(old, after[name])}
    assert moved == set(TRAINED[trains])
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


def test_the_loss_falls_by_hand_computed_steps() -> None:
    """One step of the gate alone, by its derivative in closed form."""
    x, y = batch()
    unit = nn.Linear(FEATURES, 1)
    mixed = mixture(trains="gate", gate=silent(unit))
    mixed.eval()
    features = mixed.shared[:-1](x)
    p_local, p_shared = (part(x).softmax(1).gather(1, y[:, None]) for part in (mixed.local, mixed.shared))
    slope = -0.25 * (p_local - p_shared) / (0.5 * (p_local + p_shared))  # d loss / d a at h = 1/2
    F.nll_loss(mixed(x), y).backward()
    assert unit.weight.grad is not None and unit.bias.grad is not None
    torch.testing.assert_close(unit.bias.grad, slope.mean(dim=0))
    torch.testing.assert_close(unit.weight.grad, (slope * features).mean(dim=0, keepdim=True))
