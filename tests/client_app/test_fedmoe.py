"""FedMoE's client half by itself: what it trains, what it tells, and what it leaves alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from client_app import runtime
from client_app.algorithms import fedmoe
from client_app.client import ClientContext
from client_app.runtime import Runtime
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.pretraining import provide_common_expert
from fedjets_flwr.models.transformer import (
    LanguageArchitecture,
    Sets,
    joined,
    parted,
    transformer_of,
    vector_names,
    whole,
)
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.messages import Job
from tests.support.text import Settings, text_folder, text_settings

__all__ = ["text_folder", "text_settings"]

HELD: Sets = ((1, 3), (0,))
ASKED = {"activation": 1, "used": 1}


class Site:
    """One process, and the vectors of a language model that it is sent."""

    def __init__(self, settings: Settings, **changes: object) -> None:
        config = settings(strategy__name="fedmoe", **changes)
        common = provide_common_expert(config, lambda text: None)
        assert isinstance(common.architecture, LanguageArchitecture)
        self.architecture = replace(common.architecture, balance=config.language_model.balance)
        self.runtime = Runtime(config, common, [self.architecture])
        self.vectors = parted(FlatModel(common.model).vector.clone(), self.architecture)
        self.task = open_task(config)

    def context(self, names: tuple[str, ...], numbers: dict[str, int], client: int = 1) -> ClientContext:
        return ClientContext(self.runtime, Job(client, names, names, numbers), 2, self.runtime.data(client))

    def unchanged(self, before: dict[str, Tensor]) -> bool:
        return all(torch.equal(self.vectors[name], vector) for name, vector in before.items())

    def copies(self) -> dict[str, Tensor]:
        return {name: vector.clone() for name, vector in self.vectors.items()}


def test_a_round_trains_what_is_held_and_tells_of_that_alone(text_settings: Settings) -> None:
    site = Site(text_settings)
    names, before = vector_names(HELD), site.copies()
    update = fedmoe.train(site.context(names, ASKED), site.vectors)
    assert site.unchanged(before)
    assert tuple(update.vectors) == names

    # The same steps by torch's own optimizer on a model that is built here.
    context = site.context(names, ASKED)
    module = build(replace(site.architecture, held=HELD), 0)
    FlatModel(module).load(joined(before, HELD))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    samples, losses = site.task.samples(1), []
    model = transformer_of(module.train())
    for rows in context.order():
        loss = F.cross_entropy(module(samples.stored[rows]).flatten(0, 1), samples.targets[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 4  # train.local-steps
    trained = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(joined(update.vectors, HELD), trained, atol=1e-5, rtol=1e-4)
    assert update.numbers["loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert update.numbers["num-examples"] == len(samples)
    assert update.numbers["used"] == model.sent.flatten().tolist()
    windows = sum(len(rows) for rows in site.context(names, ASKED).order())
    assert sum(update.numbers["used"]) == 2 * windows * 32  # layers, windows, tokens

    val = site.task.samples(1, part="val")
    model.sent.zero_()
    with torch.inference_mode():
        nats = float(F.cross_entropy(module.eval()(val.stored).flatten(0, 1), val.targets.flatten()))
    assert update.numbers["score"] == pytest.approx(nats / math.log(2), rel=1e-4)  # bytes: a token each
    shares = torch.tensor(update.numbers["activation"]).view(2, 4)
    torch.testing.assert_close(shares, model.sent / val.targets.numel(), check_dtype=False)
    assert shares.sum(dim=1).tolist() == pytest.approx([1, 1])
    for layer, ids in enumerate(HELD):
        assert not any(shares[layer, m] for m in range(4) if m not in ids)


def test_what_is_not_asked_is_not_told(text_settings: Settings) -> None:
    site = Site(text_settings)
    update = fedmoe.train(site.context(vector_names(HELD), {"activation": 0, "used": 0}), site.vectors)
    assert set(update.numbers) == {"num-examples", "loss"}


@pytest.mark.parametrize("probe", ["lora", "full"])
def test_a_probe_tells_shares_of_all_experts_and_changes_nothing(probe: str, text_settings: Settings) -> None:
    site = Site(text_settings, fedmoe__probe=probe)
    everything, before = vector_names(whole(site.architecture)), site.copies()
    base = {name: weight.clone() for name, weight in site.runtime.common.model.state_dict().items()}
    update = fedmoe.query(site.context(everything, {}), site.vectors)
    assert not update.vectors
    assert set(update.numbers) == {"num-examples", "domain", "activation"}
    assert update.numbers["domain"] == 1
    shares = torch.tensor(update.numbers["activation"]).view(2, 4)
    assert shares.sum(dim=1).tolist() == pytest.approx([1, 1])
    assert site.unchanged(before)
    assert all(torch.equal(base[name], weight) for name, weight in site.runtime.common.model.state_dict().items())
    again = fedmoe.query(site.context(everything, {}), site.vectors)
    assert again.numbers == update.numbers
    more = Site(text_settings, fedmoe__probe=probe, fedmoe__probe_steps=40, train__lr=0.03)
    assert fedmoe.query(more.context(everything, {}), more.vectors).numbers != update.numbers


def test_who_is_sent_nothing_tells_its_domain_alone(text_settings: Settings) -> None:
    site = Site(text_settings)
    update = fedmoe.query(site.context((), {}, client=2), {})
    assert update.numbers == {"num-examples": len(site.task.samples(2)), "domain": 2}


def test_a_client_answers_with_what_it_holds(text_settings: Settings, tmp_path: Path) -> None:
    site = Site(text_settings)
    context = site.context(vector_names(HELD), {})
    at = context.on("test")
    predictions = fedmoe.adapt(context, site.vectors).predict(at)
    module = build(replace(site.architecture, held=HELD), 0)
    FlatModel(module).load(joined(site.vectors, HELD))
    with torch.inference_mode():
        logits = module.eval()(at.data.samples.stored)
    want = F.cross_entropy(logits.transpose(1, 2), at.data.targets, reduction="none")
    torch.testing.assert_close(predictions[..., 0], want, atol=1e-5, rtol=1e-4)
    assert torch.equal(predictions[..., 1], (logits.argmax(2) == at.data.targets).float())


def test_a_process_keeps_the_models_of_the_last_sets_of_experts_alone(
    text_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets differ by client and change with the rounds; a thousand of them would fill the memory."""
    site = Site(text_settings)
    pairs = [(a, b) for a in range(4) for b in range(4)]

    def model(a: int, b: int) -> FlatModel:
        sets: Sets = ((a,), (b,))
        return site.runtime.model(replace(site.architecture, held=sets), joined(site.vectors, sets))

    first = model(*pairs[0])
    monkeypatch.setattr(runtime, "KEPT_FLOATS", 8 * first.spec.size)
    assert model(*pairs[0]) is first
    for pair in pairs:
        model(*pair)
    assert len(site.runtime._pools) == 8
    again = model(*pairs[0])
    assert again is not first
    assert torch.equal(again.vector, first.vector)
