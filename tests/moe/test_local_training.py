import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.sections import Train
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.gating import anchor_gate_loss, chosen_weights, mixture_loss, scores
from fedjets_flwr.moe.local_training import LossesOf, Sgd, batches, fit, rate

SAMPLES, PIXELS, EMBEDDING, CLASSES, EXPERTS = 6, 4, 3, 3, 4
EXPERT_LR, GATE_LR = 0.3, 0.7
Matrix = np.ndarray


def linear(inputs: int, outputs: int, seed: int) -> FlatModel:
    torch.manual_seed(seed)
    return FlatModel(nn.Sequential(nn.Linear(inputs, outputs)))


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, PIXELS, generator=generator)
    return x, torch.randn(SAMPLES, EMBEDDING, generator=generator), torch.tensor([0, 1, 2, 2, 1, 0])


def one_batch() -> Iterator[Tensor]:
    return iter([torch.arange(SAMPLES)])


def matrices(model: FlatModel) -> tuple[Matrix, Matrix]:
    layer = model.module[0]  # type: ignore[index]
    return layer.weight.detach().double().numpy().copy(), layer.bias.detach().double().numpy().copy()


def softmax(x: Matrix) -> Matrix:
    e: Matrix = np.exp(x - x.max(axis=-1, keepdims=True))
    e /= e.sum(axis=-1, keepdims=True)
    return e


def stepped(model: tuple[Matrix, Matrix], lr: float, delta: Matrix, x: Matrix) -> tuple[Matrix, Matrix]:
    """A linear layer with output gradients ``delta`` (n, outputs): dW = delta^T x, db = sum of delta."""
    return model[0] - lr * delta.T @ x, model[1] - lr * delta.sum(axis=0)


def mixture_of(
    experts: Sequence[FlatModel], ids: Sequence[int], gate: FlatModel, mix: str, renormalise: bool
) -> LossesOf:
    x, h, y = data()

    def losses_of(rows: Tensor) -> list[Tensor]:
        weights = chosen_weights(scores(gate.module(h[rows])), ids, renormalise)
        logits = torch.stack([expert.module(x[rows]) for expert in experts])
        return [mixture_loss(logits, weights, y[rows], mix)]

    return losses_of


def cross_entropy_of(model: FlatModel, x: Tensor, y: Tensor) -> LossesOf:
    return lambda rows: [F.cross_entropy(model.module(x[rows]), y[rows])]


def assert_layer(model: FlatModel, expected: tuple[Matrix, Matrix]) -> None:
    for found, wanted in zip(matrices(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_one_normal_step_equals_the_gradient_by_hand(mix: str, renormalise: bool) -> None:
    """z_k = W_k x + b_k, g = softmax(V h + c), w = entries of g at the K ids, divided by their sum S if renormalised.

    ``logits``: s = sum_k w_k z_k, d = (softmax(s) - onehot(y)) / n; dz_k = w_k d and dw_k = d . z_k.
    ``probs``: p = sum_k w_k q_k[y] with q_k = softmax(z_k), so dw_k = -q_k[y] / (n p) and
    dz_k = (w_k q_k[y] / p) (q_k - onehot(y)) / n.
    Renormalised: dg_k = (dw_k - sum_l w_l dw_l) / S. Softmax: da_m = g_m (dg_m - sum_l g_l dg_l).
    """
    ids = [2, 0]
    x, h, y = data()
    experts, gate = [linear(PIXELS, CLASSES, 1), linear(PIXELS, CLASSES, 2)], linear(EMBEDDING, EXPERTS, 3)
    before, gate_before = [matrices(expert) for expert in experts], matrices(gate)
    optimizers = [*(Sgd(expert, EXPERT_LR) for expert in experts), Sgd(gate, GATE_LR)]
    loss = fit([*experts, gate], optimizers, one_batch(), mixture_of(experts, ids, gate, mix, renormalise))

    xs, hs, onehot = x.double().numpy(), h.double().numpy(), np.eye(CLASSES)[y.numpy()]
    z = np.stack([xs @ w.T + b for w, b in before])
    g = softmax(hs @ gate_before[0].T + gate_before[1])
    raw = g[:, ids].T
    total = raw.sum(axis=0) if renormalise else np.ones(SAMPLES)
    w = raw / total
    if mix == "logits":
        p = softmax((w[:, :, None] * z).sum(axis=0))
        d = (p - onehot) / SAMPLES
        dz, dw = w[:, :, None] * d, (d * z).sum(axis=2)
        expected_loss = -np.log((p * onehot).sum(axis=1)).mean()
    else:
        q = softmax(z)
        right = (q * onehot).sum(axis=2)
        p = (w * right).sum(axis=0)
        dz, dw = (w * right / p)[:, :, None] * (q - onehot) / SAMPLES, -right / p / SAMPLES
        expected_loss = -np.log(p).mean()
    if renormalise:
        dw = (dw - (w * dw).sum(axis=0)) / total
    dg = np.zeros_like(g)
    dg[:, ids] = dw.T
    da = g * (dg - (g * dg).sum(axis=1, keepdims=True))

    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for expert, old, gradient in zip(experts, before, dz, strict=True):
        assert_layer(expert, stepped(old, EXPERT_LR, gradient, xs))
    assert_layer(gate, stepped(gate_before, GATE_LR, da, hs))


def anchor_step(labels: Tensor, expert_id: int) -> tuple[FlatModel, FlatModel, float]:
    x, h, _ = data()
    expert, gate = linear(PIXELS, CLASSES, 1), linear(EMBEDDING, EXPERTS, 3)
    optimizers = [Sgd(expert, EXPERT_LR), Sgd(gate, GATE_LR)]

    def losses_of(rows: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(expert.module(x[rows]), labels[rows])
        return [loss, anchor_gate_loss(gate.module(h[rows]), expert_id)]

    return expert, gate, fit([expert, gate], optimizers, one_batch(), losses_of)


def test_one_anchor_step_equals_the_gradient_by_hand() -> None:
    """Two cross entropies of linear layers: output gradients (softmax - onehot) / n, against y and against the id."""
    x, h, y = (t.numpy() for t in data())
    expert_before, gate_before = matrices(linear(PIXELS, CLASSES, 1)), matrices(linear(EMBEDDING, EXPERTS, 3))
    expert, gate, loss = anchor_step(torch.from_numpy(y), 2)
    p = softmax(x @ expert_before[0].T + expert_before[1])
    g = softmax(h @ gate_before[0].T + gate_before[1])
    assert loss == pytest.approx(-np.log(p[np.arange(SAMPLES), y]).mean(), abs=1e-6)
    assert_layer(expert, stepped(expert_before, EXPERT_LR, (p - np.eye(CLASSES)[y]) / SAMPLES, x))
    assert_layer(gate, stepped(gate_before, GATE_LR, (g - np.eye(EXPERTS)[2]) / SAMPLES, h))


def test_the_losses_of_an_anchor_are_independent() -> None:
    y = data()[2]
    expert, gate, _ = anchor_step(y, 2)
    same_expert, other_gate, _ = anchor_step(y, 0)
    other_expert, same_gate, _ = anchor_step((y + 1) % CLASSES, 2)
    assert torch.equal(expert.vector, same_expert.vector)
    assert not torch.equal(gate.vector, other_gate.vector)
    assert torch.equal(gate.vector, same_gate.vector)
    assert not torch.equal(expert.vector, other_expert.vector)


def test_a_gate_without_optimizer_stays() -> None:
    expert, gate = linear(PIXELS, CLASSES, 1), linear(EMBEDDING, EXPERTS, 3)
    before = gate.vector.clone()
    fit([expert, gate], [Sgd(expert, 0.1)], one_batch(), mixture_of([expert], [1], gate, "logits", False))
    assert torch.equal(gate.vector, before)


@pytest.mark.parametrize(("count", "size", "epochs"), [(10, 3, 2), (4, 4, 1), (3, 8, 3), (1, 1, 2)])
def test_batches_cover_every_sample_once_an_epoch(count: int, size: int, epochs: int) -> None:
    found = list(batches(count, size, epochs, torch.Generator().manual_seed(1)))
    steps = math.ceil(count / size)
    assert len(found) == steps * epochs
    for epoch in range(epochs):
        part = found[epoch * steps : (epoch + 1) * steps]
        assert all(len(rows) == size for rows in part[:-1])
        assert sorted(torch.cat(part).tolist()) == list(range(count))


def test_batches_depend_on_their_generator_alone() -> None:
    def order(seed: int) -> list[int]:
        return torch.cat(list(batches(50, 7, 2, torch.Generator().manual_seed(seed)))).tolist()

    first = order(1)
    torch.rand(3)
    assert order(1) == first
    assert order(2) != first
    assert first[:50] != first[50:]


def test_rate_constant() -> None:
    assert {rate(Train(lr=0.2), r, 10) for r in range(1, 11)} == {0.2}


def test_rate_cosine() -> None:
    """Half a cosine: the full rate in round 1, half of it in the middle, (1 + cos(0.9 pi)) / 2 in round 10 of 10."""
    train = Train(lr=0.2, schedule="cosine")
    found = [rate(train, r, 10) for r in range(1, 11)]
    assert found[0] == pytest.approx(0.2)
    assert found[5] == pytest.approx(0.1)
    assert found[9] == pytest.approx(0.1 * (1 + math.cos(0.9 * math.pi)))
    assert found == sorted(found, reverse=True)


def test_supervised_training_equals_a_plain_torch_loop() -> None:
    plain = build(Architecture("cnn", 4, "batch", "cifar", 1, 10), 5)
    flat = FlatModel(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 8, 8, generator=generator), torch.randint(0, 10, (24,), generator=generator)
    order = list(batches(24, 7, 2, generator))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    plain.train()
    losses = []
    for rows in order:
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    found = fit([flat], [Sgd(flat, 0.05, 0.9, 0.01)], iter(order), cross_entropy_of(flat, x, y))
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    wanted = plain.state_dict()
    for name, value in flat.module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_steps_are_those_of_torch(momentum: float, weight_decay: float) -> None:
    plain = build(Architecture("resnet8", 4, "batch", "cifar", 1, 10), 5)
    flat = FlatModel(copy.deepcopy(plain))
    generator = torch.Generator().manual_seed(0)
    torchs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    own = Sgd(flat, 0.1, momentum, weight_decay)
    for _ in range(3):
        for p, q in zip(plain.parameters(), flat.parameters, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        torchs.step()
        own.step()
    assert torch.equal(flat.vector, FlatModel(plain).vector)


def test_a_gradient_correction_reaches_the_step() -> None:
    """Plain SGD with gradient d + 1 ends lr lower in every weight than with gradient d."""
    x, _, y = data()

    plain, shifted = linear(PIXELS, CLASSES, 1), linear(PIXELS, CLASSES, 1)

    def add_one() -> None:
        for gradient in shifted.gradients:
            gradient.add_(1)

    fit([plain], [Sgd(plain, 0.1)], one_batch(), cross_entropy_of(plain, x, y))
    fit([shifted], [Sgd(shifted, 0.1)], one_batch(), cross_entropy_of(shifted, x, y), add_one)
    torch.testing.assert_close(plain.vector - shifted.vector, torch.full_like(plain.vector, 0.1))
