"""The Switch language model: its layer by hand, its parts as vectors, and sub-models."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.common_expert import CommonExpert, freeze, load_common_expert
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.models.switch import SwitchExpert, balance_loss, gates, switch, trained_beside
from fedjets_flwr.models.transformer import (
    LanguageArchitecture,
    Sets,
    Transformer,
    joined,
    members,
    parted,
    sets_of,
    sizes_of,
    transformer_of,
    vector_names,
    whole,
)

SMALL = LanguageArchitecture(vocabulary=19, context=7, width=8, heads=2, layers=3, switch_layers=2, experts=4, hidden=6)


def made(architecture: LanguageArchitecture, seed: int = 0) -> Transformer:
    return transformer_of(build(architecture, seed))


def tokens(architecture: LanguageArchitecture, count: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(architecture.vocabulary, (count, architecture.context), generator=generator)


def some_sets(experts: int, layers: int) -> st.SearchStrategy[Sets]:
    ids = st.sets(st.integers(0, experts - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    return st.tuples(*[ids] * layers)


def layer_of(experts: int, seed: int) -> dict[int, SwitchExpert]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {m: SwitchExpert(8, 6) for m in range(experts)}


def test_padding_changes_nothing_and_is_counted_nowhere() -> None:
    a = replace(SMALL, balance=0.1)
    read = tokens(a, count=4)
    lengths = [5, 3, 4, 1]
    padded = read.clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = -1
    there = padded >= 0
    model = made(a).train()
    logits = model(padded)
    counted = model.sent.clone()
    assert counted.sum(dim=1).tolist() == [sum(lengths)] * 2
    logits[there].square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    other = made(a).train()
    alone = [other(row[None, :length]) for row, length in zip(read, lengths, strict=True)]
    assert torch.equal(other.sent, counted)
    for found, wanted, length in zip(logits, alone, lengths, strict=True):
        assert torch.allclose(found[:length], wanted[0], atol=1e-6)
    model.zero_grad()
    model(padded[:, :5])[there[:, :5]].square().sum().backward()  # the load-balance loss is as without what is cut off
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, gradient, atol=1e-5)


# The layer -----------------------------------------------------------------------------------------------------------


def by_hand(h: np.ndarray, experts: dict[int, SwitchExpert]) -> tuple[np.ndarray, list[int], float]:
    """Token by token, in float64, from the formulas of section 5.1."""
    out, chosen, gate_sums = [], [], dict.fromkeys(experts, 0.0)
    for token in h:
        logits = {m: float(expert.row.detach().double().numpy() @ token) for m, expert in experts.items()}
        total = sum(math.exp(value) for value in logits.values())
        gate = {m: math.exp(value) / total for m, value in logits.items()}
        best = max(gate, key=lambda m: (gate[m], -m))
        up, down = (w.detach().double().numpy() for w in (experts[best].up, experts[best].down))
        out.append(gate[best] * (down @ np.maximum(up @ token, 0)))
        chosen.append(best)
        gate_sums = {m: value + gate[m] for m, value in gate_sums.items()}
    n = len(h)
    balance = len(experts) * sum(chosen.count(m) / n * gate_sums[m] / n for m in experts)
    return np.array(out), chosen, balance


@given(st.sets(st.integers(0, 4), min_size=1), st.integers(1, 9), st.integers(0, 99))
def test_a_layer_is_what_the_formulas_say(kept: set[int], count: int, seed: int) -> None:
    experts = {m: expert for m, expert in layer_of(5, seed).items() if m in kept}
    h = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    out, ids, balance = switch(h, experts)
    want, chosen, want_balance = by_hand(h.double().numpy(), experts)
    assert ids.tolist() == chosen
    np.testing.assert_allclose(out.detach().numpy(), want, atol=1e-5)
    assert float(balance.detach()) == pytest.approx(want_balance, rel=1e-5)


def test_equal_gates_go_to_the_lowest_id() -> None:
    experts = layer_of(3, 0)
    for expert in experts.values():
        expert.row.data.zero_()
    del experts[0]
    _, ids, balance = switch(torch.randn(6, 8), experts)
    assert ids.tolist() == [1] * 6
    assert float(balance.detach()) == pytest.approx(1)  # 2 (1 * 1/2 + 0 * 1/2)


def test_balance_is_one_where_all_get_alike_and_the_number_of_experts_where_one_gets_all() -> None:
    assert float(balance_loss(torch.eye(4), torch.arange(4))) == pytest.approx(1)
    alone = torch.zeros(6, 4)
    alone[:, 2] = 1
    assert float(balance_loss(alone, torch.full((6,), 2))) == pytest.approx(4)


def test_one_expert_is_a_plain_network() -> None:
    experts = layer_of(1, 3)
    h = torch.randn(4, 8)
    out, _, balance = switch(h, experts)
    assert torch.equal(out, experts[0](h))
    assert float(balance.detach()) == 1


def test_a_loss_beside_adds_its_gradient_and_changes_no_value() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    out = trained_beside(3 * x, (x**2).sum())
    assert torch.equal(out, 3 * x)
    out.sum().backward()
    assert x.grad.tolist() == [3 + 2, 3 + 4]


def test_training_mode_adds_the_gradient_of_the_weighted_balance_of_every_layer() -> None:
    x = tokens(SMALL)
    plain, balanced = made(SMALL), made(replace(SMALL, balance=0.5))
    plain.train()(x).square().mean().backward()
    balanced.train()(x).square().mean().backward()
    # The last layer's balance is of the gates there alone.
    read: list[Tensor] = []
    plain.blocks[-1].register_forward_hook(lambda module, args, out: read.append(out[1].flatten(0, 1)))
    plain(x)
    rows = torch.stack([expert.row for expert in plain.held(1).values()]).detach().requires_grad_(True)
    gate = gates(read[0].detach(), rows)
    (0.5 * balance_loss(gate, gate.argmax(1))).backward()
    for m, want in enumerate(rows.grad):
        difference = balanced.held(1)[m].row.grad - plain.held(1)[m].row.grad
        torch.testing.assert_close(difference, want, atol=1e-6, rtol=1e-4)
    assert torch.equal(plain.eval()(x), balanced.eval()(x))


# The model -----------------------------------------------------------------------------------------------------------


def test_the_sizes_of_the_specification() -> None:
    measured = LanguageArchitecture(2048, 64, 64, 4, 4, 2, 8, 128)
    assert sizes_of(measured).expert == 16_448
    assert sizes_of(measured).dense == pytest.approx(238e3, rel=0.02)
    assert sizes_of(measured).of(16) == sum(p.numel() for p in made(measured).parameters())


def test_no_token_sees_a_later_one() -> None:
    model, x = made(SMALL).eval(), tokens(SMALL, 1)
    other = x.clone()
    other[0, 4] = (other[0, 4] + 1) % SMALL.vocabulary
    before, after = model(x), model(other)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_shorter_texts_fit() -> None:
    model, x = made(SMALL).eval(), tokens(SMALL, 2)
    torch.testing.assert_close(model(x)[:, :3], model(x[:, :3]))


def test_every_token_is_counted_once_in_each_layer() -> None:
    model, x = made(SMALL), tokens(SMALL)
    model(x)
    model(x)
    assert model.sent.sum(dim=1).tolist() == [2 * x.numel()] * 2


def routed(model: Transformer, x: Tensor, allowed: Sets) -> tuple[Tensor, list[Tensor]]:
    """The full model's logits with the logits of all other rows at minus infinity, and where each token went."""
    h = model.embedding[x] + model.positions[: x.shape[1]]
    went = []
    for number, block in enumerate(model.blocks):
        h, read = block(h)
        layer = number - len(model.networks)
        if layer < 0:
            h = h + model.networks[number](read)
            continue
        experts = model.held(layer)
        logits = read @ torch.stack([expert.row for expert in experts.values()]).T
        logits[..., [m for m in experts if m not in allowed[layer]]] = -math.inf
        gate = logits.softmax(-1)
        went.append(gate.argmax(-1).flatten())
        answers = torch.stack([expert(read) for expert in experts.values()], dim=-2)
        best = gate.argmax(-1)[..., None]
        h = h + (
            gate.gather(-1, best) * answers.gather(-2, best[..., None].expand(*best.shape, h.shape[-1]))[..., 0, :]
        )
    return model.norm(h) @ model.embedding.T, went


@given(some_sets(4, 2), st.integers(0, 20))
def test_a_sub_model_is_the_full_one_without_the_other_rows(sets: Sets, seed: int) -> None:
    full, sub = made(SMALL, seed).eval(), made(replace(SMALL, held=sets)).eval()
    FlatModel(sub).load(joined(parted(FlatModel(full).vector, SMALL), sets))
    x = tokens(SMALL, 3, seed)
    want, went = routed(full, x, sets)
    torch.testing.assert_close(sub(x), want, atol=1e-6, rtol=1e-5)
    assert torch.equal(sub.sent, torch.stack([torch.bincount(ids, minlength=4) for ids in went]))


def test_one_expert_in_every_layer_is_a_dense_transformer() -> None:
    single = replace(SMALL, experts=1)
    model, x = made(single).eval(), tokens(single)
    h = model.embedding[x] + model.positions
    for number, block in enumerate(model.blocks):
        h, read = block(h)
        layer = number - len(model.networks)
        h = h + (model.networks[number](read) if layer < 0 else model.held(layer)[0](read))
    torch.testing.assert_close(model(x), model.norm(h) @ model.embedding.T)


def test_permuted_experts_permute_where_tokens_go_and_change_no_logit() -> None:
    model, other, x = made(SMALL).eval(), made(SMALL).eval(), tokens(SMALL)
    order = [[2, 0, 3, 1], [1, 3, 2, 0]]
    vectors = parted(FlatModel(model).vector.clone(), SMALL)
    renamed = dict(vectors)
    for layer, ids in enumerate(order):
        renamed |= {f"expert.{layer}.{new}": vectors[f"expert.{layer}.{old}"] for new, old in enumerate(ids)}
    FlatModel(other).load(joined(renamed, whole(SMALL)))
    torch.testing.assert_close(model(x), other(x))
    for layer, ids in enumerate(order):
        assert other.sent[layer].tolist() == [int(model.sent[layer, old]) for old in ids]


# Vectors -------------------------------------------------------------------------------------------------------------


@given(some_sets(4, 2))
def test_parts_and_the_whole_are_each_other_s_inverse(sets: Sets) -> None:
    architecture = replace(SMALL, held=sets)
    vector = FlatModel(made(architecture)).vector.clone()
    parts = parted(vector, architecture)
    assert tuple(parts) == vector_names(sets) == ("dense", *(f"expert.{i}.{j}" for i, j in members(sets)))
    assert torch.equal(joined(parts, sets), vector)
    assert sets_of(reversed(list(parts)), 2) == sets
    sizes = sizes_of(architecture)
    assert {name: len(part) for name, part in parts.items()} == {
        name: sizes.dense if name == "dense" else sizes.expert for name in parts
    }


def test_an_expert_s_vector_is_its_row_and_its_network() -> None:
    model = made(SMALL)
    expert, part = model.held(1)[2], parted(FlatModel(model).vector, SMALL)["expert.1.2"]
    assert torch.equal(part, torch.cat([expert.row, expert.up.flatten(), expert.down.flatten()]))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0}, {"heads": 3}, {"switch_layers": 4}, {"experts": 2**21}, {"layers": 5000}, {"held": ((0,),)},
        {"held": ((0,), ())}, {"held": ((0,), (4,))}, {"held": ((1, 0), (2,))}, {"held": ((1, 1), (2,))},
    ],
)  # fmt: skip
def test_an_architecture_that_no_model_has_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="size|heads|layers|held"):
        replace(SMALL, **change)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_brings_the_model_back_and_not_how_it_is_trained(tmp_path: Path) -> None:
    model = build(replace(SMALL, balance=0.5), 4)
    expert = CommonExpert(freeze(model), replace(SMALL, balance=0.5), (), (), "text", 0.25)
    save_common_expert(expert, tmp_path / "model.safetensors")
    found = load_common_expert(tmp_path / "model.safetensors")
    assert found.architecture == SMALL
    assert found.digest == expert.digest
    x = tokens(SMALL)
    assert torch.equal(found.model(x), model(x))
    assert (found.dataset, found.accuracy, found.mean, found.std) == ("text", 0.25, (), ())


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "5000"}, {"experts": "5"}, {"experts": "1000000"}, {"width": "x"}, {"width": "-8"}, {"heads": "3"},
        {"context": "8"}, {"vocabulary": ""}, {"hidden": None}, {"switch_layers": "9"}, {"mean": "0.5"},
    ],
)  # fmt: skip
def test_a_file_that_claims_another_model_is_refused(change: dict[str, str | None], tmp_path: Path) -> None:
    expert = CommonExpert(freeze(build(SMALL, 4)), SMALL, (), (), "text", 0.25)
    metadata = {"dataset": "text", "test_accuracy": "0.25", "mean": "", "std": ""}
    metadata |= {name: str(getattr(SMALL, name)) for name in vars(SMALL) if name not in ("balance", "held")} | change
    told = {name: value for name, value in metadata.items() if value is not None}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(expert.model.state_dict(), told))
    with pytest.raises(FedjetsError, match="not a common expert"):
        load_common_expert(path)
