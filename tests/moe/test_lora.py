"""The probe: it changes nothing below, begins as the model is, and learns."""

import pytest
import torch
import torch.nn.functional as F

from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.transformer import LanguageArchitecture, Transformer
from fedjets_flwr.moe.local_training import Adam, fit
from fedjets_flwr.moe.lora import LoraProbe, probe_floats

SMALL = LanguageArchitecture(19, 7, 8, 2, 3, 2, 4, 6, balance=0.3)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SMALL)


def probe_of(model: Transformer) -> LoraProbe:
    return LoraProbe(model, 2, torch.Generator().manual_seed(1))


def test_it_begins_as_the_model_bit_for_bit(model: Transformer) -> None:
    x = torch.randint(19, (5, 7))
    assert torch.equal(probe_of(model)(x), model(x))


def test_training_it_leaves_all_base_weights_as_they_are(model: Transformer) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    probe, x, y = probe_of(model), torch.randint(19, (6, 7)), torch.randint(19, (6, 7))
    below = {name: p.clone() for name, p in probe.frozen.named_parameters()}
    flat = FlatModel(probe)

    def losses_of(rows: torch.Tensor) -> list[torch.Tensor]:
        return [F.cross_entropy(probe(x[rows]).flatten(0, 1), y[rows].flatten())]

    rows = torch.arange(6)
    start = float(losses_of(rows)[0].detach())
    fit([flat], [Adam(flat, 0.01)], iter([rows] * 30), losses_of)
    assert float(losses_of(rows)[0].detach()) < start
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
    for name, weight in probe.frozen.named_parameters():
        assert torch.equal(weight, below[name])
        assert weight.grad is None


def test_it_trains_adapters_and_rows_alone(model: Transformer) -> None:
    assert FlatModel(probe_of(model)).spec.size == probe_floats(8, 6, 2 * 4, 2)


def test_a_change_of_low_rank_is_added_to_the_weights(model: Transformer) -> None:
    probe, x = probe_of(model), torch.randint(19, (5, 7))
    for b in probe.b:
        b.data.normal_()
    for name, b, a in zip(probe.names, probe.b, probe.a, strict=True):
        weight = model.get_parameter(name)
        weight.data += (b @ a).detach()
    torch.testing.assert_close(probe(x), model(x))


def test_it_counts_where_tokens_go_and_balances_nothing(model: Transformer) -> None:
    probe, x = probe_of(model).train(), torch.randint(19, (5, 7))
    probe(x)
    assert probe.frozen.sent.sum(dim=1).tolist() == [35, 35]
    assert probe.frozen.balance == 0
    assert model.balance == 0.3
