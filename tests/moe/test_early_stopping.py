"""Early stopping: when it looks, when it stops, and that the lowest loss is what stays."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Adapt
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import Stopped, fit_until_no_better, mean_loss
from fedjets_flwr.moe.local_training import Adam


class Walk:
    """A model of one weight that grows by one a step, one step an epoch, and validation losses by its value."""

    def __init__(self, losses: list[float]) -> None:
        self.model, self.losses, self.epochs = FlatModel(nn.Linear(1, 1, bias=False)), losses, 0
        self.model.load(torch.zeros(1))

    def step(self) -> None:
        self.model.vector += 1

    def epoch(self) -> Iterator[Tensor]:
        self.epochs += 1
        yield torch.tensor([0])

    def loss(self) -> float:
        return self.losses[int(self.model.vector)]

    def run(self, **rule: float) -> Stopped:
        flat = {f"adapt.{name.replace('_', '-')}": value for name, value in rule.items()}
        settings = Config.from_flat(flat).adapt
        return fit_until_no_better(self.model, self, self.epoch, self.losses_of, self.loss, settings)

    def losses_of(self, rows: Tensor) -> list[Tensor]:
        return [self.model.module(torch.ones(1, 1)).sum()]


def falling(count: int) -> list[float]:
    return [1 - 0.02 * i for i in range(count)]


def test_it_looks_after_the_first_epoch_and_every_fifth_from_there() -> None:
    """Epochs after the last look could not be kept, and are not done."""
    walk = Walk(falling(60))
    found = walk.run(max_epochs=14)
    assert found == Stopped(11, (walk.losses[1], walk.losses[6], walk.losses[11]), 2)
    assert walk.epochs == int(walk.model.vector) == 11


def test_the_last_epoch_is_looked_at_where_a_look_is_due() -> None:
    assert Walk(falling(60)).run(max_epochs=11).epochs == 11
    assert Walk(falling(60)).run(max_epochs=10).epochs == 6


def test_of_two_equal_losses_the_first_is_kept() -> None:
    walk = Walk([9, 1, 1, 2])
    assert walk.run(max_epochs=3, check_every=1).kept == 0
    assert int(walk.model.vector) == 1


def test_without_an_epoch_the_model_keeps_its_bits() -> None:
    walk = Walk([0.0])
    walk.model.load(torch.tensor([0.1]))
    assert walk.run(max_epochs=0) == Stopped(0, (), -1)
    assert torch.equal(walk.model.vector, torch.tensor([0.1]))


def test_a_fall_that_is_too_small_counts_against_patience_and_is_kept_all_the_same() -> None:
    """1, .999, .998: none falls by more than .01 from the 1 that counted; the third is the lowest."""
    walk = Walk([9, 1, 0.999, 0.998, 0.5])
    found = walk.run(max_epochs=9, check_every=1, patience=2)
    assert (found.epochs, found.kept, int(walk.model.vector)) == (3, 2, 3)


def test_small_falls_add_up_to_one_that_counts() -> None:
    walk = Walk([9, 1, 0.994, 0.988, 0.987, 0.987, 0.2])
    assert walk.run(max_epochs=9, check_every=1, patience=2).epochs == 5


@given(st.lists(st.floats(0, 3), min_size=12, max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_the_lowest_loss_of_the_looks_is_what_stays(losses: list[float], every: int, patience: int) -> None:
    walk = Walk([9.0, *losses])
    found = walk.run(max_epochs=12, check_every=every, patience=patience)
    assert found.losses == tuple(losses[i * every] for i in range(len(found.losses)))
    assert found.losses[found.kept] == min(found.losses) == walk.loss()
    assert found.epochs == 1 + (len(found.losses) - 1) * every == walk.epochs


def test_a_loss_that_is_no_number_is_never_kept() -> None:
    walk = Walk([9, float("nan"), float("nan"), float("nan")])
    assert walk.run(max_epochs=3, check_every=1).kept == -1
    assert int(walk.model.vector) == 0


def test_adam_is_torchs() -> None:
    torch.manual_seed(1)
    own, theirs = FlatModel(nn.Linear(3, 2)), nn.Linear(3, 2)
    theirs.load_state_dict(own.module.state_dict())
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    ours, reference = Adam(own, 0.01), torch.optim.Adam(theirs.parameters(), 0.01)
    for _ in range(5):
        own.zero_grad()
        F.cross_entropy(own.module(x), y).backward()
        ours.step()
        reference.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        reference.step()
    assert torch.equal(own.vector, torch.cat([p.detach().flatten() for p in theirs.parameters()]))


def test_the_mean_loss_is_over_samples_and_in_eval_mode() -> None:
    model = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9)))
    x, y = torch.randn(7, 3), torch.randint(2, (7,))
    with torch.no_grad():
        wanted = float(F.cross_entropy(model.module[0](x), y))  # type: ignore[index]
    total = partial(F.cross_entropy, reduction="sum")
    assert mean_loss(model, lambda rows: x[rows], y, total, batch_size=3) == pytest.approx(wanted, abs=1e-6)


def test_the_defaults_are_those_of_the_published_code_but_for_rate_and_length() -> None:
    assert Adapt() == Adapt(**{"check-every": 5, "min-fall": 0.01, "patience": 10, "batch-size": 10})
