"""Label-prior correction on unlabelled data (Saerens, Latinne, Decaestecker 2002): pure functions.

A classifier trained on balanced classes meets a client that holds a few of them. EM estimates the client's class
shares from the classifier's own outputs and reweights them; labels are never read.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

PRESENT = 0.02
"""Share from which on :func:`support_prior` takes a class to be there."""

PSEUDO = 1.0
"""Samples of each class that :func:`map_prior` takes to have been seen before: the mode under a Dirichlet(2) prior."""


def em_prior(probs: Tensor, iterations: int = 500, tolerance: float = 1e-7, pseudo: float = 0.0) -> Tensor:
    """Return the estimated class shares q, (C,), of unlabelled samples with classifier outputs ``probs`` (n, C).

    Iterates q <- (sum_j normalise(q * p(y | x_j)) + a) / (n + a C) from the uniform prior, the one that the classifier
    is taken to have; a = ``pseudo`` is 0 for the maximum of the likelihood.
    """
    p = probs.double()
    q = torch.full((p.shape[1],), 1 / p.shape[1], dtype=torch.float64, device=p.device)
    for _ in range(iterations):
        update = (with_prior(p, q).sum(dim=0) + pseudo) / (p.shape[0] + pseudo * p.shape[1])
        if float((update - q).abs().max()) < tolerance:
            return update
        q = update
    return q


def with_prior(probs: Tensor, prior: Tensor) -> Tensor:
    """Return normalise(prior * probs) per sample, (n, C), in float64; the prior itself where the product is zero."""
    weighted = probs.double() * prior.double()
    total = weighted.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weighted / total.clamp_min(1e-300), prior.double())


def support_prior(probs: Tensor) -> Tensor:
    """Return equal shares of the classes to which EM gives :data:`PRESENT` or more, (C,).

    A client of K groups of classes holds few of them alike: which ones is all that it needs to know.
    """
    present = (em_prior(probs) >= PRESENT).double()
    return present / present.sum().clamp_min(1.0)


def map_prior(probs: Tensor) -> Tensor:
    """Return EM's shares drawn to equal ones by :data:`PSEUDO` samples a class, (C,): for few samples."""
    return em_prior(probs, pseudo=PSEUDO)


ESTIMATES: Mapping[str, Callable[[Tensor], Tensor]] = {"em": em_prior, "support": support_prior, "map": map_prior}
"""How class shares q, (C,), are found in a classifier's outputs, (n, C), without labels; by name."""


def present_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Return 1 for each class that occurs, (C,): the mask of the upper bound that knows which classes a client has."""
    return (torch.bincount(labels, minlength=num_classes) > 0).double()
