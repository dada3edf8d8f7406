"""A partition as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedjets_flwr.data.datasets import Dataset
from fedjets_flwr.data.partition import Split


def label_counts(dataset: Dataset, split: Split) -> np.ndarray:
    """Return samples by (client, class)."""
    train, test = dataset.train.labels.numpy(), dataset.test.labels.numpy()
    return np.stack(
        [
            np.bincount((test if client in split.unseen_ids else train)[rows], minlength=len(dataset.classes))
            for client, rows in enumerate(split.samples)
        ]
    )


def draw(counts: np.ndarray, ends: Sequence[int], path: Path) -> None:
    """Draw the samples by client and class; lines part anchors, normal, unseen and validation clients at their ends."""
    import matplotlib

    matplotlib.use("Agg")
    import seaborn
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(min(18, 4 + 0.16 * len(counts)), 4.5))
    shares = counts / counts.sum(axis=1, keepdims=True)
    seaborn.heatmap(shares.T, cmap="viridis", ax=axes, vmin=0, cbar_kws={"label": "share of the client's samples"})
    for edge in ends:
        axes.axvline(edge, color="white", linewidth=2)
    axes.set(xlabel="client (anchors | normal | unseen | validation)", ylabel="class", title="who holds which labels")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
