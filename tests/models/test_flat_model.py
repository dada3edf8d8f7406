import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.sections import Model
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Sgd

NAMES = get_args(Model.model_fields["name"].annotation)
NORMS = get_args(Model.model_fields["norm"].annotation)
CASES = [(name, norm) for name in NAMES for norm in NORMS]


def architecture(name: str, norm: str, width: int = 16) -> Architecture:
    return Architecture(name, width, norm, "cifar", 3, 10)


def small(norm: str = "batch", seed: int = 0) -> nn.Sequential:
    return build(architecture("resnet8", norm, 4), seed)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.randint(0, 10, (5,), generator=generator)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_load_round_trip(name: str, norm: str) -> None:
    """The vector is the parameters, then the float buffers, each in the module's order."""
    module = build(architecture(name, norm), 0)
    parameters = [key for key, _ in module.named_parameters()]
    buffers = [key for key, b in module.named_buffers() if b.is_floating_point()]
    start = torch.cat([t.detach().flatten() for t in module.parameters()])
    flat = FlatModel(module)
    assert torch.equal(flat.vector[: flat.spec.trained], start)
    assert [key for key, _ in flat.spec.entries] == parameters + buffers
    assert flat.spec.size == flat.vector.numel()
    vector = torch.rand(flat.spec.size, generator=torch.Generator().manual_seed(1))
    flat.load(vector)
    state, position = module.state_dict(), 0
    for key, shape in flat.spec.entries:
        count = state[key].numel()
        assert torch.equal(state[key], vector[position : position + count].view(shape)), key
        position += count
    assert position == len(vector)
    assert torch.equal(flat.weights.detach(), vector[: flat.spec.trained])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_only_counters_do_not_travel(name: str, norm: str) -> None:
    """``num_batches_tracked`` is without influence only while batch norm has a fixed momentum."""
    module = build(architecture(name, norm), 0)
    left = {key.rpartition(".")[2] for key, b in module.named_buffers() if not b.is_floating_point()}
    assert left == ({"num_batches_tracked"} if any(isinstance(m, nn.BatchNorm2d) for m in module.modules()) else set())
    assert all(m.momentum is not None for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_vector_and_module_share_memory() -> None:
    flat = FlatModel(small())
    with torch.no_grad():
        flat.vector.fill_(0.5)
    assert all(bool((p == 0.5).all()) for p in flat.module.parameters())
    with torch.no_grad():
        next(flat.module.parameters()).fill_(2.0)
    assert flat.vector[0] == 2
    assert flat.weights[0] == 2


def test_running_statistics_show_up_in_the_vector() -> None:
    flat = FlatModel(small())
    trained, before = flat.spec.trained, flat.vector.clone()
    flat.module.train()(batch()[0])
    assert torch.equal(flat.vector[:trained], before[:trained])
    found = dict(flat.module.named_buffers())["stem.bn1.running_mean"]
    assert not torch.equal(flat.vector[trained:], before[trained:])
    names = [key for key, _ in flat.spec.entries]
    sizes = [torch.Size(shape).numel() for _, shape in flat.spec.entries]
    start = sum(sizes[: names.index("stem.bn1.running_mean")])
    assert torch.equal(flat.vector[start : start + 4], found)
    assert found.abs().sum() > 0


def test_gradients_are_those_of_the_module() -> None:
    plain = small()
    flat = FlatModel(copy.deepcopy(plain))
    x, y = batch()
    F.cross_entropy(plain.train()(x), y).backward()
    wanted = [p.grad for p in plain.parameters()]
    for _ in range(2):  # twice: nothing is left of the first
        flat.zero_grad()
        F.cross_entropy(flat.module.train()(x), y).backward()
        for found, gradient in zip(flat.gradients, wanted, strict=True):
            torch.testing.assert_close(found, gradient)
    flat.zero_grad()
    for gradient in flat.gradients:
        assert not gradient.any()
        gradient.add_(1)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in flat.module.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_steps_on_the_vector_equal_steps_on_the_module(norm: str) -> None:
    plain = small(norm)
    flat = FlatModel(copy.deepcopy(plain))
    ordinary = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    own = Sgd(flat, lr=0.1, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        x, y = batch(seed)
        ordinary.zero_grad()
        F.cross_entropy(plain.train()(x), y).backward()
        ordinary.step()
        flat.zero_grad()
        F.cross_entropy(flat.module.train()(x), y).backward()
        own.step()
    torch.testing.assert_close(flat.vector, FlatModel(plain).vector, rtol=1e-4, atol=1e-6)


def test_parts_of_a_vector_have_the_shapes_of_the_weights() -> None:
    flat = FlatModel(small())
    views = flat.views(flat.weights)
    assert [view.data_ptr() for view in views] == [p.data_ptr() for p in flat.module.parameters()]
    assert [view.shape for view in views] == [p.shape for p in flat.module.parameters()]


def test_digest_tells_architectures_apart() -> None:
    models = [architecture("resnet8", norm, width) for norm in NORMS for width in (4, 8)]
    models += [architecture("cnn", "batch", 4), Architecture("resnet8", 4, "batch", "cifar", 3, 9)]
    digests = {FlatModel(build(a, 0)).spec.digest for a in models}
    assert len(digests) == len(models)
    assert FlatModel(small(seed=0)).spec.digest == FlatModel(small(seed=1)).spec.digest
