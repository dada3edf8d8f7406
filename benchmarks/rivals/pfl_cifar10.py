"""pfl-research's CIFAR-10 benchmark on pfl 0.6, run in pfl's own environment.

The settings are those of its benchmarks/image_classification/configs/baseline.yaml, without evaluation and privacy:
users of 50 images, cohort 50, batch 10, SGD 0.1, 2-convolution CNN. Under torchrun it uses all its processes.

    python pfl_cifar10.py DATA LINES TORCH-THREADS CHANNELS-LAST
"""
# mypy: ignore-errors

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn

USERS, COHORT, BATCH, RATE = 1000, 50, 10, 0.1


class Line(TrainingProcessCallback):
    """Writes a line for each central iteration."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """Tell that an iteration is over."""
        if os.environ.get("RANK", "0") == "0":
            with self._path.open("a") as file:
                file.write(json.dumps({"round": central_iteration + 1}) + "\n")
        return False, Metrics()


def loss(self, inputs, targets, eval=False):
    """Cross entropy, as pfl's models define it."""
    self.eval() if eval else self.train()
    return F.cross_entropy(self(inputs), targets)


@torch.no_grad()
def metrics(self, inputs, targets, eval=True):
    """Loss and accuracy, as pfl's models define them; never asked for here."""
    self.eval() if eval else self.train()
    right = (self(inputs).argmax(1) == targets).float().sum().item()
    return {"accuracy": Weighted(right, len(inputs))}


def main(folder: str, lines: str, threads: str, channels_last: str) -> None:
    """Train without end."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    np.random.seed(0)
    images, labels = (torch.from_numpy(np.load(Path(folder) / f"{n}.npy", mmap_mode="c")) for n in ("images", "labels"))
    samples = len(labels) // USERS
    slices = [slice(u * samples, (u + 1) * samples) for u in range(USERS)]
    layout = torch.channels_last if channels_last == "1" else torch.contiguous_format
    users = [(images[s].contiguous(memory_format=layout), labels[s]) for s in slices]
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    net.loss, net.metrics = types.MethodType(loss, net), types.MethodType(metrics, net)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), 1.0))
    data = FederatedDataset.from_slices(users, get_user_sampler("random", range(USERS)))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=1_000_000,
            evaluation_frequency=1_000_000,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()]),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=RATE, local_num_epochs=1, local_batch_size=BATCH),
        callbacks=[Line(Path(lines))],
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
