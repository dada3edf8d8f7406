"""Scores -> top-K experts -> expert per sample, and the read-outs: pure functions.

Shapes: n samples, M experts, K chosen experts, C classes. FedJETs, section 4.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(gate_logits: Tensor) -> Tensor:
    """Return the softmax over all M experts, (n, M)."""
    return gate_logits.softmax(dim=1)


def top_k_experts(sample_scores: Tensor, k: int) -> tuple[int, ...]:
    """Return e_s = TOPK(sum_i g(x_i)), best first: the sum of probabilities over ALL local samples (Algorithm 1).

    Ties go to the lower id, so that the choice is the same on every machine.
    """
    total = sample_scores.double().sum(dim=0)
    return tuple(int(m) for m in torch.argsort(total, descending=True, stable=True)[:k])


def chosen_weights(sample_scores: Tensor, experts: Sequence[int], renormalise: bool) -> Tensor:
    """Return [g(x_j)]_i for i in ``experts``, (n, K): raw entries of the softmax over M, or renormalised over the K."""
    weights = sample_scores[:, list(experts)]
    return weights / weights.sum(dim=1, keepdim=True) if renormalise else weights


def mixture_loss(logits: Tensor, weights: Tensor, labels: Tensor, mix: str) -> Tensor:
    """Return a normal client's loss, CE(sum_i [g]_i f(x, W_i), y), averaged over the batch.

    Args:
        logits: outputs of the K experts, (K, n, C).
        weights: gate weights, (n, K).
        labels: (n,) int64.
        mix: ``logits`` as the paper's "standard cross entropy" implies, or ``probs``.
    """
    return _MIXES[mix](logits, weights.t().unsqueeze(2), labels)


def _mix_logits(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((weights * logits).sum(dim=0), labels)


def _mix_probs(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    log_mixture = (weights.log() + logits.log_softmax(dim=2)).logsumexp(dim=0)
    return F.nll_loss(log_mixture, labels)


_MIXES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"logits": _mix_logits, "probs": _mix_probs}


def anchor_gate_loss(gate_logits: Tensor, expert: int) -> Tensor:
    """Return an anchor's gate loss, CE(g(x), onehot(its expert)), averaged over the batch."""
    return F.cross_entropy(gate_logits, torch.full((len(gate_logits),), expert, device=gate_logits.device))


def top_1_of(weights: Tensor) -> Tensor:
    """Return the position among the K of each sample's best expert, (n,): j' = argmax_{j in e_u} [g]_j."""
    return weights.argmax(dim=1)


def read_top_1(probs: Tensor, weights: Tensor) -> Tensor:
    """Return each sample's best expert's probabilities (the paper's test rule): (K, n, C), (n, K) -> (n, C)."""
    best = top_1_of(weights)
    return probs[best, torch.arange(len(best), device=best.device)]


def read_mixture(probs: Tensor, weights: Tensor) -> Tensor:
    """Return the mixture of the K experts by their renormalised gate weights, (n, C)."""
    shares = weights / weights.sum(dim=1, keepdim=True)
    mixed: Tensor = torch.einsum("nk,knc->nc", shares, probs)
    return mixed


def read_mean(probs: Tensor, weights: Tensor) -> Tensor:
    """Return the plain mean of the K models' probabilities, (n, C): an ensemble."""
    return probs.mean(dim=0)


READ_OUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "top-1": read_top_1,
    "mixture": read_mixture,
    "mean": read_mean,
}


def entropy(sample_scores: Tensor) -> Tensor:
    """Return each sample's gate entropy divided by log M, (n,): 0 is certain, 1 is uniform; 0 for M = 1."""
    if sample_scores.shape[1] == 1:
        return torch.zeros(len(sample_scores))
    nats: Tensor = -torch.special.xlogy(sample_scores, sample_scores).sum(dim=1)
    return nats / math.log(sample_scores.shape[1])
