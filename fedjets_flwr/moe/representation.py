"""FedSR's two regularisers of a representation (Nguyen et al. 2022, equations 6 to 9): pure functions.

Shapes: n samples, d features, C classes. mu and sigma (n, d) are the moments of z given x; m and s (C, d) those of the
client's reference for each class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_SCALE = 1e-3
"""Smallest factor of the representation before it is compared: its logarithm must exist."""


def length(z: Tensor) -> Tensor:
    """Return mean_j ||z_j||, as the authors' code has it."""
    norms: Tensor = z.norm(dim=1)
    return norms.mean()


def squared_length(z: Tensor) -> Tensor:
    """Return mean_j ||z_j||^2, as the paper has it."""
    return z.square().sum(dim=1).mean()


FORMS = {"norm": length, "squared": squared_length}
"""What ``fedsr.l2-form`` names."""


def divergence(mean: Tensor, deviation: Tensor, other_mean: Tensor, other_deviation: Tensor) -> Tensor:
    """Return KL(N(mean, deviation^2) || N(other_mean, other_deviation^2)) of diagonal Gaussians, (n,)."""
    ratio = (deviation.square() + (mean - other_mean).square()) / (2 * other_deviation.square())
    return (other_deviation.log() - deviation.log() + ratio - 0.5).sum(dim=1)


class Reference(nn.Module):
    """A client's own reference r(z|y) = N(m_y, diag(s_y^2)), and the factor by which z is compared with it.

    None of it is ever sent.
    """

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(num_classes, features))
        self.raw = nn.Parameter(torch.ones(num_classes, features))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, mean: Tensor, deviation: Tensor, targets: Tensor) -> Tensor:
        """Return mean_j KL(N(c mu_j, (c sigma_j)^2) || N(m_y, s_y^2)), the bound of I(x; z | y)."""
        scale = self.scale.clamp_min(LEAST_SCALE)
        m, s = self.mean[targets], F.softplus(self.raw[targets])
        return divergence(scale * mean, scale * deviation, m, s).mean()
