"""A partition as a table and a picture."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Dataset
from fedjets_flwr.data.partition import Split
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import TRAIN


def label_counts(dataset: Dataset, split: Split) -> np.ndarray:
    """Return samples by (client, class)."""
    train, test = dataset.train.labels.numpy(), dataset.test.labels.numpy()
    return np.stack(
        [
            np.bincount((test if client in split.unseen_ids else train)[rows], minlength=len(dataset.classes))
            for client, rows in enumerate(split.samples)
        ]
    )


def roles_of(config: Config) -> list[str]:
    """Return what each client is, by id: ``anchor``, ``normal``, or the role of one that never trains."""
    split = config.partition
    roles = [split.role_of(client) for client in range(split.all_clients)]
    trains = ("normal", "anchor")
    return [trains[client < config.num_anchors] if role == TRAIN else role for client, role in enumerate(roles)]


def draw(counts: np.ndarray, roles: Sequence[str], path: Path) -> None:
    """Draw the samples by client and class, (clients, classes); lines part clients of different roles."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(min(18, 4 + 0.16 * len(counts)), 4.5))
    shares = counts / counts.sum(axis=1, keepdims=True)
    seaborn.heatmap(shares.T, cmap="viridis", ax=axes, vmin=0, cbar_kws={"label": "share of the client's samples"})
    for client, (before, role) in enumerate(pairwise(roles), start=1):
        if role != before:
            axes.axvline(client, color="white", linewidth=2)
    kinds = " | ".join(dict.fromkeys(roles))
    axes.set(xlabel=f"client ({kinds})", ylabel="class", title="who holds which labels")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except ValueError as error:  # an ending that is no picture's
        raise FedjetsError(f"--output {path}: {error}") from None
    finally:
        pyplot.close(figure)
