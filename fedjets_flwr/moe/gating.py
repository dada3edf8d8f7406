"""Scores -> top-K experts -> expert per sample, and the read-outs: pure functions.

Shapes: n samples, M experts, K chosen experts, C classes. FedJETs, section 4.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedjets_flwr.models.calibration import mean_entropy


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
    weights = sample_scores[:, list(experts)].clamp_min(torch.finfo(sample_scores.dtype).tiny)
    return weights / weights.sum(dim=1, keepdim=True) if renormalise else weights


def mixture_loss(logits: Tensor, weights: Tensor, labels: Tensor, mix: str, offset: Tensor | float = 0.0) -> Tensor:
    """Return a normal client's loss, CE(sum_i [g]_i f(x, W_i), y), averaged over the batch.

    Args:
        logits: outputs of the K experts, (K, n, C).
        weights: gate weights, (n, K).
        labels: (n,) int64.
        mix: ``logits`` as the paper's "standard cross entropy" implies, or ``probs``.
        offset: added to the logits of each class, (C,) (see :func:`label_offset`).
    """
    return MIXES[mix](logits, weights.t().unsqueeze(2), labels, offset)


def label_offset(labels: Tensor, num_classes: int) -> Tensor:
    """Return log local label shares, (C,), for logit-adjusted training (Menon et al. 2021; balanced softmax).

    Trained on ``logits + offset``, a model leaves the client's label shares to the offset and its own logits are free
    of them. An absent class counts as a share of 1e-6.
    """
    shares = torch.bincount(labels, minlength=num_classes) / len(labels)
    return (shares + 1e-6).log()


def _mix_logits(logits: Tensor, weights: Tensor, labels: Tensor, offset: Tensor | float) -> Tensor:
    return F.cross_entropy((weights * logits).sum(dim=0) + offset, labels)


def _mix_probs(logits: Tensor, weights: Tensor, labels: Tensor, offset: Tensor | float) -> Tensor:
    log_mixture = (weights.log() + (logits + offset).log_softmax(dim=2)).logsumexp(dim=0)
    return F.nll_loss(log_mixture, labels)


MIXES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | float], Tensor]] = {
    "logits": _mix_logits,
    "probs": _mix_probs,
}


def anchor_gate_loss(gate_logits: Tensor, expert: int) -> Tensor:
    """Return an anchor's gate loss, CE(g(x), onehot(its expert)), averaged over the batch."""
    return F.cross_entropy(gate_logits, torch.full((len(gate_logits),), expert, device=gate_logits.device))


def top_1_of(weights: Tensor) -> Tensor:
    """Return the position among the K of each sample's best expert, (n,): j' = argmax_{j in e_u} [g]_j."""
    return weights.argmax(dim=1)


def read_top_1(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return each sample's best expert's probabilities (the paper's test rule): (K, n, C), (n, K) -> (n, C)."""
    best = top_1_of(weights)
    return probs[best, torch.arange(best.shape[0], device=best.device)]


def read_mixture(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return the mixture of the K experts by their renormalised gate weights, (n, C); equal ones if all are zero."""
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    shares = weights / weights.sum(dim=1, keepdim=True)
    mixed: Tensor = torch.einsum("nk,knc->nc", shares, probs)
    return mixed


def read_blend(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return the geometric mean of the mixture and the common expert, (n, C): an expert that every client has.

    Not in the paper. The common expert knows all classes, so that a label outside the K experts is not lost.
    """
    tiny = torch.finfo(torch.float32).tiny  # never 0 / 0, however sure the two are of different classes
    blend = (read_mixture(probs, weights, common, keep).double() * common.double()).sqrt().clamp_min(tiny)
    return (blend / blend.sum(dim=1, keepdim=True)).to(common.dtype)


def read_mean(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return the plain mean of the K models' probabilities, (n, C): an ensemble."""
    return probs.mean(dim=0)


def read_surest(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return the probabilities of the one model that is surest of all samples together, (n, C): see :func:`surest`.

    Not in the paper. The gate sees what the common expert sees; which of the K experts it chose knows images like these
    best shows in their own answers.
    """
    return probs[int(surest(probs).argmax())]


def read_familiar(probs: Tensor, weights: Tensor, common: Tensor, keep: bool) -> Tensor:
    """Return what the best expert says, as in :func:`read_top_1`, or the common expert if it is to be kept, (n, C).

    Not in the paper. See :func:`keeps_common`. The common expert answers as it is, whatever statistics the experts
    have: it is kept where samples are like its own.
    """
    return common if keep else read_top_1(probs, weights, common, keep)


READ_OUTS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "top-1": read_top_1,
    "mixture": read_mixture,
    "blend": read_blend,
    "mean": read_mean,
    "surest": read_surest,
    "familiar": read_familiar,
}
"""Read-outs by name, -> (n, C).

Of the probabilities of the K experts (K, n, C), their gate weights (n, K), the common expert's probabilities (n, C),
and whether the common expert is to be kept."""


def surest(probs: Tensor) -> Tensor:
    """Return scores of K models for samples without labels where no gate gives any, (K,): 1 for the surest, else 0.

    It is the model whose predictions (K, n, C) have the lowest mean entropy; among equals the first.
    """
    return torch.nn.functional.one_hot(mean_entropy(probs).argmin(), len(probs)).to(probs.dtype)


def keeps_common(expert: Tensor, common: Tensor, usual: tuple[float, float]) -> bool:
    """Return whether samples are more familiar to the common expert than to the expert that the gate chose for them.

    They are where it is less sure than usual by less. How sure a model is does not tell: one that learned blurred
    images is sure of none, and one that learned sharp ones is surer of blurred ones than that, and wrong. Nor can this
    choose among experts: those that are never sure are the least less sure of anything.

    Args:
        expert: the probabilities of the gate's first choice with batch-norm statistics of these samples, (n, C): with
            trained ones a model may be the surer the less it knows.
        common: the common expert's, likewise, (n, C).
        usual: mean entropy of the answers of either to samples that it is made for, in nats, as above.
    """
    less_sure = [float(mean_entropy(probs)) - nats for probs, nats in zip((expert, common), usual, strict=True)]
    return less_sure[1] < less_sure[0]


def entropy(sample_scores: Tensor) -> Tensor:
    """Return each sample's gate entropy divided by log M, (n,): 0 is certain, 1 is uniform; 0 for M = 1."""
    if sample_scores.shape[1] == 1:
        return torch.zeros(len(sample_scores))
    nats: Tensor = -torch.special.xlogy(sample_scores, sample_scores).sum(dim=1)
    return nats / math.log(sample_scores.shape[1])
