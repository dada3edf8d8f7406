"""Text as a task, in closed form: windows, bits per byte, right tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from fedjets_flwr.data.text import open_text
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.language_pretraining import windows
from fedjets_flwr.tasks import open_task
from fedjets_flwr.tasks.language_modelling import LanguageModelling
from tests.support.text import Settings, text_folder, text_settings

__all__ = ["text_folder", "text_settings"]


def test_windows_follow_each_other_and_targets_are_the_tokens_after() -> None:
    cut = windows(torch.arange(11), 3)
    assert cut is not None
    inputs, targets = cut
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert windows(torch.arange(3), 3) is None
    assert (one := windows(torch.arange(4), 3)) is not None
    assert one[1].tolist() == [[1, 2, 3]]


def test_a_client_s_samples_are_the_windows_of_its_text(text_settings: Settings) -> None:
    config = text_settings()
    task = open_task(config)
    assert isinstance(task, LanguageModelling)
    for client in range(3):
        for part in ("train", "val", "test"):
            held, samples = open_text(config).client(client, part), task.samples(client, part=part)
            assert torch.equal(samples.stored.flatten(), held.tokens[: samples.stored.numel()])
            assert torch.equal(samples.targets[:, :-1], samples.stored[:, 1:])
            assert samples.columns.tolist() == [client] * len(samples)
            assert samples.per_byte == len(held.tokens) / held.num_bytes == 1  # bytes
            assert samples.training
        assert task.known(client) == len(task.samples(client, part="shared"))
    assert task.spec.kinds == ("sums", "tales", "code")


def test_losses_are_means_over_tokens_and_sums_over_windows(text_settings: Settings) -> None:
    task = open_task(text_settings())
    outputs, targets = torch.randn(5, 4, 7), torch.randint(7, (5, 4))
    each = -outputs.log_softmax(2).gather(2, targets[..., None])[..., 0]
    assert float(task.loss(outputs, targets)) == pytest.approx(float(each.mean()))
    assert float(task.total_loss(outputs, targets)) == pytest.approx(float(each.mean(dim=1).sum()), rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(text_settings: Settings) -> None:
    task = open_task(text_settings())
    samples = task.samples(0, part="test")
    outputs = torch.zeros(*samples.targets.shape, 256)
    predictions = task.predictions(outputs, samples.targets)
    assert task.told(predictions, samples) == {"bits-per-byte": pytest.approx(8), "domain": 0}
    assert predictions[..., 0].unique().tolist() == [pytest.approx(math.log(256))]
    assert task.count_right(predictions, samples.targets) == [0, samples.targets.numel()]
    sure = 30.0 * F.one_hot(samples.targets, 256)
    predictions = task.predictions(sure, samples.targets)
    assert task.told(predictions, samples)["bits-per-byte"] == pytest.approx(0, abs=1e-6)
    assert task.count_right(predictions, samples.targets) == [samples.targets.numel()] * 2


def test_text_shorter_than_a_window_is_refused(text_settings: Settings) -> None:
    task = open_task(text_settings(text__val_tokens=32))
    with pytest.raises(FedjetsError, match=r"text\.val-tokens: 32 are less .* raise it"):
        task.samples(0, part="val")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("moe__trainable", "head"), ("train__logit_adjust", True), ("partition__private_share", 0.5),
        ("attack__kind", "label-flip"), ("cohort__anchor_selection", "k-means"), ("run__start_from", "runs/a"),
        ("language_model__heads", 3), ("language_model__switch_layers", 9),
    ],
)  # fmt: skip
def test_settings_that_text_has_no_use_for_are_refused(setting: str, value: object, text_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match=setting.replace("__", ".").replace("_", "-")):
        text_settings(**{setting: value})
