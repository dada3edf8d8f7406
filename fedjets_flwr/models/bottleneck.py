"""A stochastic bottleneck between a model's features and its head (FedSR, Nguyen et al. 2022, section 3)."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 0.1
"""Standard deviation of the representation at the start."""
LEAST = 1e-6
"""Smallest standard deviation: softplus underflows."""


class Bottleneck(nn.Module):
    """Features (n, f) -> the representation z ~ N(mu, diag(sigma^2)), (n, f); or mu, where nobody draws.

    It starts with mu = the features, so that a model with one answers as without it.

    Attributes:
        noise: of the draws; None: z = mu.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(features, 2 * features), None
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[:features] = torch.eye(features)
            self.linear.bias[:features] = 0.0
            self.linear.bias[features:] = math.log(math.expm1(START))

    noise: torch.Generator | None

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma, (n, f) each."""
        mean, raw = self.linear(features).chunk(2, dim=1)
        return mean, F.softplus(raw).clamp_min(LEAST)

    def forward(self, features: Tensor) -> Tensor:
        """Return z."""
        mean, deviation = self.moments(features)
        if self.noise is None:
            return mean
        return mean + deviation * torch.randn(mean.shape, generator=self.noise, device=mean.device)


def with_bottleneck(model: nn.Sequential) -> nn.Sequential:
    """Return a model with a bottleneck before its head; its own modules are part of both."""
    *rest, (name, head) = model.named_children()
    assert isinstance(head, nn.Linear)
    named = [*rest, ("bottleneck", Bottleneck(head.in_features)), (name, head)]
    return nn.Sequential(OrderedDict(named))
