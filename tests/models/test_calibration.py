"""Temperature scaling against a classifier whose right temperature is known, and how sure models usually are."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_dataset, open_public
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.calibration import fit_temperature, mean_entropy, usual_entropy
from fedjets_flwr.models.common_expert import accuracy_of, load_common_expert, logits_of
from fedjets_flwr.models.pretraining import pretrain, save_common_expert
from fedjets_flwr.moe.adabn import adapt_batch_norm
from fedjets_flwr.seeds import derive


@pytest.mark.parametrize("wanted", [0.4, 1.0, 3.0])
def test_labels_drawn_from_what_a_model_says_at_a_temperature_give_it_back(wanted: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / wanted).softmax(1), 1, generator=generator).flatten()
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(wanted, rel=0.03)
    best = F.cross_entropy(logits / found, labels)
    assert all(best < F.cross_entropy(logits / (found * factor), labels) for factor in (0.8, 1.25))


def test_a_model_that_is_never_wrong_has_a_temperature_all_the_same() -> None:
    assert 0.1 <= fit_temperature(torch.eye(4), torch.arange(4)) < 0.11
    assert 9 < fit_temperature(-torch.eye(4), torch.arange(4)) <= 10


def test_a_common_expert_of_public_samples_knows_its_temperature_and_any_other_has_none(tmp_path: Path) -> None:
    """It is fitted on the public samples that were held out, and lies in the file."""
    few = {"common-expert.target-accuracy": 0.5, "run.device": "cpu"}
    config = Config.from_flat({**few, "partition.public-share": 0.3})
    expert, public = pretrain(config, lambda text: None), open_public(config)
    held_out = len(public) // 5
    logits = logits_of(expert, public.pixels[:held_out])
    assert expert.temperature == pytest.approx(fit_temperature(logits, public.labels[:held_out]), rel=1e-3)
    assert expert.temperature != 1
    save_common_expert(expert, tmp_path / "fitted.safetensors")
    assert load_common_expert(tmp_path / "fitted.safetensors").temperature == expert.temperature
    assert pretrain(Config.from_flat(few), lambda text: None).temperature == 1.0
    absurd = [("temperature", 1e9), ("usual_entropy", -0.1), ("usual_entropy", math.inf)]
    for number, (name, value) in enumerate(absurd):
        path = tmp_path / f"absurd-{number}.safetensors"
        save_common_expert(replace(expert, **{name: value}), path)  # type: ignore[arg-type]
        with pytest.raises(FedjetsError, match=name):
            load_common_expert(path)


def test_it_also_knows_how_sure_it_usually_is_of_those_samples_with_their_own_statistics(tmp_path: Path) -> None:
    config = Config.from_flat(
        {"common-expert.target-accuracy": 0.5, "run.device": "cpu", "partition.public-share": 0.3}
    )
    expert, public = pretrain(config, lambda text: None), open_public(config)
    pixels = expert.normalise(public.pixels[: len(public) // 5])
    own = copy.deepcopy(expert.model)
    adapt_batch_norm(own, pixels.__getitem__, len(pixels))
    p = own(pixels).softmax(1).double()
    assert expert.usual_entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=0.02)  # a variance of n - 1
    save_common_expert(expert, tmp_path / "measured.safetensors")
    assert load_common_expert(tmp_path / "measured.safetensors").usual_entropy == expert.usual_entropy


def test_mean_and_usual_entropy_by_hand() -> None:
    """ln 2 and 0 nats; the batch norm of a batch of 1 and 3 has outputs -1 and 1, whatever the model learned."""
    assert mean_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).item() == pytest.approx(math.log(2) / 2)
    norm = torch.nn.BatchNorm1d(2, eps=1e-12, affine=False)
    norm.running_mean = torch.tensor([50.0, -50.0])
    p = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).softmax(1)
    found = usual_entropy(norm, torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    assert found == pytest.approx(float(-(p * p.log()).sum(1).mean()))
    assert norm.running_mean.tolist() == [50.0, -50.0]
    assert usual_entropy(norm.eval(), torch.tensor([[3.0, 1.0]])) == pytest.approx(0, abs=1e-6)  # of one there are none


def test_without_an_epoch_a_common_expert_is_its_random_start(tmp_path: Path) -> None:
    """Nothing of the images that it is looked at with gets into its running statistics."""
    config = Config.from_flat({"run.cache-dir": str(tmp_path), "common-expert.max-epochs": 0})
    expert = pretrain(config, lambda text: None)
    start = build(expert.architecture, derive(config.common_expert.seed, "common-expert")).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in expert.model.state_dict().items())
    assert not expert.model.training
    test = open_dataset(config).test
    assert expert.accuracy == accuracy_of(expert, test.pixels, test.labels) < 0.3


def test_how_sure_a_model_usually_is_has_no_dropout_in_it() -> None:
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.BatchNorm1d(20), nn.Linear(20, 4))
    inputs = torch.randn(30, 3)
    assert usual_entropy(model, inputs) == usual_entropy(model, inputs)
    model[2].train()
    model[1].eval()
    assert usual_entropy(model, inputs) == pytest.approx(float(mean_entropy(model(inputs).softmax(1))), rel=1e-5)
