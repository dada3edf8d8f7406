"""Label-prior correction on unlabelled data (Saerens, Latinne, Decaestecker 2002): pure functions.

A classifier trained on balanced classes meets a client that holds a few of them. EM estimates the client's class
shares from the classifier's own outputs and reweights them; labels are never read.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

PRESENT = 0.02
"""Share from which on :func:`support_prior` takes a class to be there."""

PSEUDO = 1.0
"""Samples of each class that :func:`map_prior` takes to have been seen before: the mode under a Dirichlet(2) prior."""


def em_prior(probs: Tensor, iterations: int = 500, tolerance: float = 1e-7, pseudo: float = 0.0) -> Tensor:
    """Return the estimated class shares q, (C,) float64, of unlabelled samples with outputs ``probs`` (n, C).

    Iterates q <- (sum_j normalise(q * p(y | x_j)) + a) / (n + a C) from the uniform prior, the one that the classifier
    is taken to have; a = ``pseudo`` is 0 for the maximum of the likelihood. The sum is q * (p^T (1 / p q)), two
    products of a matrix and a vector. A sample that no class of q can explain counts as q.
    """
    p = probs.double().cpu().numpy()  # an iteration is a few small operations, which NumPy starts sooner
    samples, classes = p.shape
    q = np.full(classes, 1 / classes)
    for _ in range(iterations):
        total = p @ q
        explained = total > 0
        inverse = np.divide(1.0, total, out=np.zeros_like(total), where=explained)
        update = (q * (inverse @ p + (samples - np.count_nonzero(explained))) + pseudo) / (samples + pseudo * classes)
        moved, q = np.abs(update - q).max(), update
        if moved < tolerance:
            break
    return torch.from_numpy(q).to(probs.device)


def with_prior(probs: Tensor, prior: Tensor) -> Tensor:
    """Return normalise(prior * probs) per sample, (n, C), in float64; the prior itself where the product is zero."""
    weighted = probs.double() * prior.double()
    total = weighted.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weighted / total.clamp_min(1e-300), prior.double())


def support_of(shares: Tensor) -> Tensor:
    """Return equal shares of the classes to which EM's ``shares`` (C,) give :data:`PRESENT` or more, (C,); else of all.

    A client of K groups of classes holds few of them alike: which ones is all that it needs to know.
    """
    present = (shares >= PRESENT).double()
    if not present.any():
        present = torch.ones_like(present)
    return present / present.sum()


def map_prior(probs: Tensor) -> Tensor:
    """Return EM's shares drawn to equal ones by :data:`PSEUDO` samples a class, (C,): for few samples."""
    return em_prior(probs, pseudo=PSEUDO)


def group_prior(probs: Tensor, groups: Sequence[Collection[int]], held: int) -> Tensor:
    """Return equal shares of the classes of the ``held`` groups with the most summed probability, (C,).

    Of all classes, if there are no groups. Ties go to the group that comes first.
    """
    if not groups:
        return torch.full((probs.shape[1],), 1 / probs.shape[1], dtype=torch.float64)
    total = probs.double().sum(dim=0)
    mass = torch.stack([total[sorted(group)].sum() for group in groups])
    prior = torch.zeros_like(total)
    for chosen in torch.argsort(mass, descending=True, stable=True)[:held].tolist():
        prior[sorted(groups[chosen])] = 1.0
    return prior / prior.sum()


def estimates(probs: Tensor) -> dict[str, Tensor]:
    """Return class shares q, (C,), that a classifier's outputs (n, C) tell without labels, by :data:`ESTIMATES`."""
    shares = em_prior(probs)
    return dict(zip(ESTIMATES, (shares, support_of(shares), map_prior(probs)), strict=True))


ESTIMATES = ("em", "support", "map")
"""How class shares are estimated: by EM, as what EM finds present, by EM with samples seen before."""


def present_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Return 1 for each class that occurs, (C,): the mask of the upper bound that knows which classes a client has."""
    return (torch.bincount(labels, minlength=num_classes) > 0).double()
