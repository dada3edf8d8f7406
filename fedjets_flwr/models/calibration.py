"""How sure a model is: temperature scaling (Guo et al. 2017), and how sure it usually is of what it was made for."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOUND = math.log(10)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the T, from 0.1 to 10, at which softmax(logits / T) has the lowest mean loss.

    Args:
        logits: of samples that did not train the model, (n, C).
        labels: theirs, (n,) int64.
    """
    # A third of a second of every process's start, and few ever fit.
    from scipy.optimize import minimize_scalar

    exact = logits.double()

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(exact / math.exp(log_t), labels))

    return math.exp(minimize_scalar(loss, bounds=(-BOUND, BOUND), method="bounded").x)


def mean_entropy(probs: Tensor) -> Tensor:
    """Return the mean entropy of class probabilities (..., n, C) over the n samples, (...) float64, in nats."""
    nats: Tensor = torch.special.entr(probs.double()).sum(dim=-1)
    return nats.mean(dim=-1)


@torch.no_grad()
def usual_entropy(model: nn.Module, inputs: Tensor, batch_size: int = 512) -> float:
    """Return how sure a model is of samples that it is made for: the mean entropy of its answers, in nats.

    Every batch is normalised by its own statistics, as AdaBN does with a client's samples.

    Args:
        model: is left as it is.
        inputs: of samples that did not train it, (n, ...), n >= 1.
        batch_size: samples that are normalised together, at most.
    """
    batches = inputs.tensor_split(-(-len(inputs) // batch_size))
    own = copy.deepcopy(model).eval()  # dropout would make every measurement another one
    for layer in own.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train(len(batches[-1]) > 1)
    return float(mean_entropy(torch.cat([own(batch).softmax(dim=1) for batch in batches])))
