"""Label-prior correction on unlabelled data (Saerens, Latinne, Decaestecker 2002): pure functions.

A classifier trained on balanced classes meets a client that holds a few of them. EM estimates the client's class
shares from the classifier's own outputs and reweights them; labels are never read.
"""

import torch
from torch import Tensor


def em_prior(probs: Tensor, iterations: int = 500, tolerance: float = 1e-7) -> Tensor:
    """Return the estimated class shares q, (C,), of unlabelled samples with classifier outputs ``probs`` (n, C).

    Iterates q <- mean_j normalise(q * p(y | x_j)) from the uniform prior, the one the classifier is taken to have.
    """
    p = probs.double()
    q = torch.full((p.shape[1],), 1 / p.shape[1], dtype=torch.float64, device=p.device)
    for _ in range(iterations):
        update = with_prior(p, q).mean(dim=0)
        if float((update - q).abs().max()) < tolerance:
            return update
        q = update
    return q


def with_prior(probs: Tensor, prior: Tensor) -> Tensor:
    """Return normalise(prior * probs) per sample, (n, C), in float64; the prior itself where the product is zero."""
    weighted = probs.double() * prior.double()
    total = weighted.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weighted / total.clamp_min(1e-300), prior.double())


def correct(probs: Tensor) -> Tensor:
    """Return the outputs after EM, (n, C)."""
    return with_prior(probs, em_prior(probs))


def present_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Return 1 for each class that occurs, (C,): the mask of the upper bound that knows which classes a client has."""
    return (torch.bincount(labels, minlength=num_classes) > 0).double()
