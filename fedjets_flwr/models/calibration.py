"""Temperature scaling (Guo et al. 2017): as sure as it is right."""

import math

import torch.nn.functional as F
from torch import Tensor

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
