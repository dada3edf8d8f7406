"""FedADG's networks and losses in closed form (Zhang et al. 2021)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.adversarial import (
    LABEL,
    Discriminator,
    Generator,
    label_input,
    look_generated,
    look_real,
    seeded,
    smoothed_cross_entropy,
    tell_apart,
)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 0.9))
def test_smoothing_spreads_a_share_over_the_other_classes(seed: int, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(6, 5, generator=generator), torch.randint(5, (6,), generator=generator)
    wanted = torch.full((6, 5), smoothing / 4)
    wanted[torch.arange(6), targets] = 1 - smoothing
    found = smoothed_cross_entropy(logits, targets, smoothing)
    torch.testing.assert_close(found, -(wanted * logits.log_softmax(1)).sum(dim=1).mean())
    assert torch.equal(smoothed_cross_entropy(logits, targets, 0.0), F.cross_entropy(logits, targets))


def test_the_three_losses() -> None:
    on_generated, on_features = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 1.0])
    assert tell_apart(on_generated, on_features).item() == pytest.approx((0.75**2 + 0.25**2 + 0.25 + 1) / 2)
    assert look_generated(on_features).item() == pytest.approx(0.125)
    assert look_real(on_generated).item() == pytest.approx((0.0625 + 0.5625) / 2)


def test_where_both_are_alike_half_is_the_best_answer() -> None:
    shares = torch.linspace(0, 1, 101)
    losses = torch.stack([tell_apart(q, q) for q in shares])
    assert losses.min().item() == pytest.approx(0.5)
    assert shares[losses.argmin()].item() == pytest.approx(0.5)


def test_the_networks_are_the_papers() -> None:
    made = seeded(3, Generator, (8, 4, 16, 5))
    assert isinstance(made, Generator)
    noise, labels = torch.rand(6, 8), label_input(torch.tensor([0, 1, 2, 3, 0, 1]), 4)
    assert labels.tolist()[1] == pytest.approx([0, LABEL, 0, 0])
    features = made(noise, labels)
    inner = torch.cat([noise, labels], 1) @ made.hidden.weight.t() + made.hidden.bias
    wanted = (torch.where(inner > 0, inner, 0.01 * inner) @ made.output.weight.t() + made.output.bias).clamp_min(0)
    torch.testing.assert_close(features, wanted)
    bound = 0.5 * (6 / (12 + 16)) ** 0.5
    assert 0.9 * bound < float(made.hidden.weight.abs().max()) <= bound
    critic = seeded(4, Discriminator, (5, 4, 7, 16))
    assert isinstance(critic, Discriminator)
    assert critic.projection.bias is None
    joined = torch.cat([features @ critic.projection.weight.t(), labels], 1)
    inner = joined @ critic.hidden.weight.t() + critic.hidden.bias
    logit = torch.where(inner > 0, inner, 0.01 * inner) @ critic.output.weight.t() + critic.output.bias
    torch.testing.assert_close(critic(features, labels), logit.sigmoid().squeeze(1))
    assert critic(features, labels).shape == (6,)


def test_a_seed_decides_the_weights_and_leaves_torchs_own_draws_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return FlatModel(seeded(seed, Generator, (8, 4, 16, 5))).vector

    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(weights(1), weights(1))
    assert torch.equal(torch.rand(1), before)
    assert not torch.equal(weights(1), weights(2))
    assert isinstance(seeded(1, nn.Linear, (2, 3)), nn.Linear)
