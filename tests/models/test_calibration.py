"""Temperature scaling against a classifier whose right temperature is known."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_dataset, open_public
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.calibration import fit_temperature
from fedjets_flwr.models.common_expert import accuracy_of, load_common_expert, logits_of
from fedjets_flwr.models.pretraining import pretrain, save_common_expert
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
    save_common_expert(replace(expert, temperature=1e9), tmp_path / "absurd.safetensors")
    with pytest.raises(FedjetsError, match="temperature"):
        load_common_expert(tmp_path / "absurd.safetensors")


def test_without_an_epoch_a_common_expert_is_its_random_start(tmp_path: Path) -> None:
    """Nothing of the images that it is looked at with gets into its running statistics."""
    config = Config.from_flat({"run.cache-dir": str(tmp_path), "common-expert.max-epochs": 0})
    expert = pretrain(config, lambda text: None)
    start = build(expert.architecture, derive(config.common_expert.seed, "common-expert")).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in expert.model.state_dict().items())
    assert not expert.model.training
    test = open_dataset(config).test
    assert expert.accuracy == accuracy_of(expert, test.pixels, test.labels) < 0.3
