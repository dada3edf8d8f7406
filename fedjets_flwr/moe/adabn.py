"""AdaBN (Li et al. 2016, arXiv 1603.04779): batch norm with the statistics of the client's own unlabelled samples.

To clients whose samples look different it is what EM is to clients whose classes differ: free, and without labels.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedjets_flwr.tasks.base import Inputs

BATCH = 512
"""Samples that are normalised together. Statistics of more are the means of their batches'."""


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers of a model that have statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@torch.no_grad()
def adapt_batch_norm(model: nn.Module, inputs: Inputs, count: int) -> None:
    """Put the statistics of ``count`` samples in place of the running ones of all batch norms; weights stay.

    Args:
        model: is left in eval mode; without a batch norm nothing happens.
        inputs: the samples' batches.
        count: n >= 1; of a single sample without spatial extent there are no statistics, and the old ones stay.
    """
    layers = batch_norms(model)
    if layers and count > 1:
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over batches
        model.train()
        for rows in _batches(count):
            model(inputs(rows))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    model.eval()


def _batches(count: int) -> tuple[torch.Tensor, ...]:
    """Return rows in batches of nearly equal size, so that each counts the same."""
    return torch.arange(count).tensor_split(-(-count // BATCH))
