"""FedSR's bottleneck and regularisers in closed form (Nguyen et al. 2022)."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.bottleneck import LEAST, START, Bottleneck, with_bottleneck
from fedjets_flwr.moe.representation import FORMS, Reference, divergence


def gaussians(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, other = (torch.randn(6, 3, generator=generator, dtype=dtype) for _ in range(2))
    deviation, wide = (torch.rand(6, 3, generator=generator, dtype=dtype) + 0.1 for _ in range(2))
    return mean, deviation, other, wide


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_the_divergence_is_torchs_and_never_negative(seed: int) -> None:
    mean, deviation, other, wide = gaussians(seed)
    found = divergence(mean, deviation, other, wide)
    torch.testing.assert_close(found, kl_divergence(Normal(mean, deviation), Normal(other, wide)).sum(dim=1))
    assert bool((found > 0).all())
    torch.testing.assert_close(divergence(mean, deviation, mean, deviation), torch.zeros(6, dtype=torch.float64))


def test_a_reference_compares_each_sample_with_its_class() -> None:
    mean, deviation, *_ = gaussians(1, torch.float32)
    reference, targets = Reference(4, 3), torch.tensor([0, 3, 1, 1, 2, 0])
    assert F.softplus(reference.raw)[0, 0].item() == pytest.approx(1.3133, abs=1e-4)
    with torch.no_grad():
        reference.mean.copy_(torch.arange(12.0).view(4, 3) / 5)
        reference.raw.copy_(torch.linspace(-1, 2, 12).view(4, 3))
        reference.scale.fill_(1.7)
    m, s = reference.mean[targets], F.softplus(reference.raw)[targets]
    wanted = kl_divergence(Normal(1.7 * mean, 1.7 * deviation), Normal(m, s)).sum(dim=1).mean()
    torch.testing.assert_close(reference(mean, deviation, targets), wanted)
    with torch.no_grad():
        reference.scale.fill_(-5.0)  # no logarithm of it
    assert math.isfinite(float(reference(mean, deviation, targets)))


def test_the_gradients_of_a_reference_are_right() -> None:
    mean, deviation, *_ = gaussians(2)
    reference, targets = Reference(2, 3).double(), torch.tensor([0, 1, 1, 0, 0, 1])

    def loss(m: Tensor, raw: Tensor, scale: Tensor) -> Tensor:
        values = {"mean": m, "raw": raw, "scale": scale}
        found: Tensor = torch.func.functional_call(reference, values, (mean, deviation, targets))
        return found

    assert torch.autograd.gradcheck(loss, tuple(p.detach().requires_grad_() for p in reference.parameters()))


def test_the_lengths() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert FORMS["norm"](z).item() == pytest.approx((5 + 2) / 2)
    assert FORMS["squared"](z).item() == pytest.approx((25 + 4) / 2)


def test_a_bottleneck_starts_as_nothing_with_a_small_deviation() -> None:
    neck, features = Bottleneck(5), torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    mean, deviation = neck.moments(features)
    assert torch.equal(mean, features)
    torch.testing.assert_close(deviation, torch.full((7, 5), START))
    assert torch.equal(neck(features), features)
    with torch.no_grad():
        neck.linear.bias[5:] = -1000.0
    assert torch.equal(neck.moments(features)[1], torch.full((7, 5), LEAST))


def test_draws_are_of_the_moments_and_of_their_generator() -> None:
    neck, features = Bottleneck(2), torch.tensor([[1.0, -2.0]]).expand(20_000, 2)

    def drawn(seed: int) -> Tensor:
        neck.noise = torch.Generator().manual_seed(seed)
        found: Tensor = neck(features).detach()
        return found

    first = drawn(1)
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))
    torch.testing.assert_close(first.mean(dim=0), features[0], atol=0.005, rtol=0)
    torch.testing.assert_close(first.std(dim=0), torch.full((2,), START), atol=0.003, rtol=0)


@pytest.mark.parametrize("trainable", ["all", "stage", "head"])
def test_a_model_with_a_bottleneck_answers_as_without_and_its_tail_has_it(trainable: str) -> None:
    plain = Architecture("cnn", 4, "batch", "cifar", 1, 10)
    assert repr(plain) == repr(Architecture("cnn", 4, "batch", "cifar", 1, 10, "gaussian"))  # digests stay
    model = build(plain, 1).eval()
    x = torch.rand(3, 1, 8, 8)
    wide = with_bottleneck(model)
    assert torch.equal(wide(x), model(x))
    assert [name for name, _ in wide.named_children()] == ["layer1", "layer2", "pool", "bottleneck", "head"]
    part = tail(wide, trainable)
    names = [name for name, _ in part.named_children()]
    assert (
        names
        == {
            "all": ["layer1", "layer2", "pool", "bottleneck", "head"],
            "stage": ["layer2", "pool", "bottleneck", "head"],
            "head": ["bottleneck", "head"],
        }[trainable]
    )
    assert [name for name, _ in tail(model, trainable).named_children()] == [n for n in names if n != "bottleneck"]
    assert isinstance(build(Architecture("cnn", 4, "batch", "cifar", 1, 10, "gaussian"), 1)[-2], Bottleneck)
    assert isinstance(wide[-1], nn.Linear)
