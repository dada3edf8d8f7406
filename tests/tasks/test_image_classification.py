"""The one task there is, in closed form, and that clients train on what their task calls the loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from client_app.algorithms import fedavg, scaffold
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.tasks import open_task
from fedjets_flwr.tasks.image_classification import ImageClassification
from fedjets_flwr.wire.messages import Job
from tests.support.tiny import common_expert, context_of, start_vectors, tiny, tiny_runtime


def test_the_loss_is_the_cross_entropy_of_logits_with_the_offset_and_its_sum() -> None:
    task = open_task(tiny())
    outputs, targets = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]), torch.tensor([0, 2])
    offset = torch.tensor([0.5, -0.5, 0.0])
    shifted = outputs + offset
    each = [float(shifted[i].exp().sum().log() - shifted[i, t]) for i, t in enumerate(targets)]
    assert float(task.loss(outputs, targets, offset)) == pytest.approx(sum(each) / 2)
    assert float(task.total_loss(outputs, targets, offset)) == pytest.approx(sum(each))


def test_right_answers_are_counted_of_all() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    assert open_task(tiny()).count_right(probs, torch.tensor([0, 1, 1])) == [2, 3]


def test_a_clients_samples_are_its_images() -> None:
    found, images = open_task(tiny()).samples(1), open_client(tiny(), 1).images
    assert torch.equal(found.stored, images.pixels)
    assert torch.equal(found.targets, images.labels)
    assert (found.client, found.labelled, found.training, len(found)) == (1, True, True, len(images))


def test_inputs_are_normalised_and_augmented_for_training_alone() -> None:
    task, common = open_task(tiny(data__augment="crop", moe__trainable="all")), common_expert()
    stored, rows = task.samples(0).stored, torch.tensor([2, 0])
    assert torch.equal(task.inputs(stored, common)(rows), common.normalise(stored[rows]))
    moved = task.inputs(stored, common, torch_generator(0, "augment"))(rows)
    assert not torch.equal(moved, common.normalise(stored[rows]))
    assert torch.equal(moved, task.inputs(stored, common, torch_generator(0, "augment"))(rows))


class Squared(ImageClassification):
    """Images that are told apart by least squares on their probabilities."""

    def loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return the mean squared distance to the one-hot label."""
        return self.total_loss(outputs, targets, offset) / len(targets)

    def total_loss(self, outputs: Tensor, targets: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Return its sum."""
        wanted = F.one_hot(targets, outputs.shape[1])
        return ((outputs + offset).softmax(dim=1) - wanted).square().sum()


def test_clients_train_on_the_loss_of_their_task(tmp_path: Path) -> None:
    """One step on the whole client is a step along the task's gradient, and so is SCAFFOLD's variate."""
    one_step = {"train__batch_size": 500, "train__local_epochs": 1, "train__momentum": 0.0, "train__weight_decay": 0.0}
    runtime = tiny_runtime(tmp_path, **one_step, scaffold__option="I")
    runtime.task = Squared(runtime.config)
    start = start_vectors("expert.0")["expert.0"]
    context = context_of(runtime, Job(0, ("expert.0",)), 1)
    model = context.expert(0, start)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters]
    features, data = context.plain_inputs()(torch.arange(len(context.data))), context.data
    outputs = features @ weights[0].t() + weights[1]
    loss = runtime.task.loss(outputs, data.targets, data.offset)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    zeros = torch.zeros_like(gradient)
    update = scaffold.train(context, {"expert.0": start, "correction.0": zeros})
    torch.testing.assert_close(update.vectors["variate.0"], gradient, rtol=1e-4, atol=1e-6)
    update = fedavg.train(context, {"expert.0": start})
    step = runtime.config.train.lr * 1.0
    torch.testing.assert_close(update.vectors["expert.0"], start - step * gradient, rtol=1e-4, atol=1e-5)
