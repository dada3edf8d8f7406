"""Text to be written for text, in closed form: losses of targets alone, bits of their bytes, scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.data.text_tasks import open_tasks
from fedjets_flwr.data.text_tokens import NOTHING
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.tasks import open_task
from fedjets_flwr.tasks.base import Samples
from fedjets_flwr.tasks.text_to_text import TextToText
from tests.support.tasks import Settings, task_folder, task_settings

__all__ = ["task_folder", "task_settings"]


class Knows(nn.Module):
    """A model that tells of some samples what their targets say, and otherwise the token 0."""

    def __init__(self, samples: Samples, vocabulary: int) -> None:
        super().__init__()
        self.samples, self.vocabulary, self.unused = samples, vocabulary, nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        told = torch.zeros_like(tokens)
        for row, out in zip(tokens, told, strict=True):
            for read, targets in zip(self.samples.stored, self.samples.targets, strict=True):
                prompt = read[: int((targets != NOTHING).nonzero()[0]) + 1]
                if torch.equal(row[: len(prompt)], prompt):
                    known = targets[: len(out)].clamp(min=0)
                    out[: len(known)] = known
        return F.one_hot(told, self.vocabulary).float()


def test_a_client_s_samples_are_its_pairs(task_settings: Settings) -> None:
    config = task_settings()
    task = open_task(config)
    assert isinstance(task, TextToText)
    for client in range(3):
        for part, count in (("train", 60), ("val", 20), ("test", 20)):
            held = open_tasks(config).client(client, part)  # type: ignore[arg-type]
            samples = task.samples(client, part=part)
            assert torch.equal(samples.stored, held.read)
            assert torch.equal(samples.targets, held.targets)
            assert samples.columns.tolist() == [client] * count
            assert samples.per_byte == int((held.targets >= 0).sum()) / held.num_bytes
            assert samples.training
        assert task.known(client) == len(task.samples(client, part="shared"))
    assert task.spec.kinds == ("topics", "names", "sums")
    assert task.scores == {"topics": ("accuracy",), "names": ("f1", "exact-match"), "sums": ("rouge-2",)}


def test_a_batch_is_as_wide_as_its_longest_sample(task_settings: Settings) -> None:
    task = open_task(task_settings())
    stored = torch.tensor([[1, 2, NOTHING, NOTHING], [1, 2, 3, NOTHING], [1, NOTHING, NOTHING, NOTHING]])
    inputs = task.inputs(stored, None)  # type: ignore[arg-type]
    assert inputs(torch.tensor([0, 2])).tolist() == [[1, 2], [1, NOTHING]]
    assert inputs(torch.tensor([1])).tolist() == [[1, 2, 3]]


def test_losses_are_of_the_targets_tokens_alone(task_settings: Settings) -> None:
    task = open_task(task_settings())
    outputs = torch.randn(3, 4, 7)
    targets = torch.tensor([[-1, 3, 4, -1, -1], [-1, -1, 2, 6, -1], [-1, 5, -1, -1, -1]])  # as wide as a sample may be
    told = -outputs.log_softmax(dim=2)
    each = [[told[0, 1, 3], told[0, 2, 4]], [told[1, 2, 2], told[1, 3, 6]], [told[2, 1, 5]]]
    flat = torch.stack([loss for row in each for loss in row])
    assert float(task.loss(outputs, targets)) == pytest.approx(float(flat.mean()))
    means = torch.stack([torch.stack(row).mean() for row in each])
    assert float(task.total_loss(outputs, targets)) == pytest.approx(float(means.sum()), rel=1e-5)
    predictions = task.predictions(outputs, targets)
    assert predictions[:, 0].tolist() == pytest.approx([float(sum(row)) for row in each])
    assert predictions[:, 2].tolist() == [2, 2, 1]
    outputs[0, 0], outputs[0, 3], outputs[2, 2:] = 9.0, -9.0, torch.randn(2, 7)
    assert float(task.loss(outputs, targets)) == pytest.approx(float(flat.mean()))


def test_bits_are_of_a_target_s_bytes(task_settings: Settings) -> None:
    config = task_settings()
    task, split = open_task(config), open_tasks(config)
    samples = task.samples(0, part="test")
    num_bytes = split.client(0, "test").num_bytes
    assert num_bytes == sum(len(split.text(row[row >= 0])) for row in samples.targets)
    outputs = torch.zeros(*samples.targets.shape, split.vocabulary)
    predictions = task.predictions(outputs, samples.targets)
    tokens = int((samples.targets >= 0).sum())
    assert task.told(predictions, samples) == {
        "bits-per-byte": pytest.approx(math.log2(split.vocabulary) * tokens / num_bytes), "domain": 0,
    }  # fmt: skip
    assert task.count_right(predictions, samples.targets) == [0, tokens]
    sure = 30.0 * F.one_hot(samples.targets.clamp(min=0), split.vocabulary)
    assert task.count_right(task.predictions(sure, samples.targets), samples.targets) == [tokens, tokens]


@pytest.mark.parametrize("client", [0, 1, 2])
def test_who_writes_the_target_scores_1_and_who_writes_something_else_0(client: int, task_settings: Settings) -> None:
    config = task_settings()
    task, split = open_task(config), open_tasks(config)
    samples = task.samples(client, part="test")
    names = task.scores[task.spec.kinds[client]]
    before = samples.stored.clone()
    assert task.written(Knows(samples, split.vocabulary), samples) == dict.fromkeys(names, 1.0)
    assert torch.equal(samples.stored, before)
    assert task.written(Knows(samples.first(0), split.vocabulary), samples) == dict.fromkeys(names, 0.0)
    half = task.written(Knows(samples.first(10), split.vocabulary), samples)
    assert half == dict.fromkeys(names, 0.5)


@pytest.mark.parametrize("scores", ["accuracy,f1,bleu", "accuracy,f1", "accuracy,f1,rouge-2,f1", ""])
def test_scores_that_there_are_not_are_told(scores: str, task_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match=r"text\.scores"):
        open_task(task_settings(text__scores=scores))


def test_there_is_nothing_that_all_share(task_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match="there is no global part"):
        open_task(task_settings()).samples(0, part="global")
