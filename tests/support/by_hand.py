"""What clients compute, in NumPy and float64, from the formulas alone: nothing here calls the code that it checks.

A linear expert is one vector (W, b) with outputs W x + b. The gate is one vector (V, c, U, d) with outputs
U relu(V s + c) + d, where s is the embedding less its mean, over its standard deviation. ``delta`` are derivatives of
a loss by outputs, (n, outputs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import torch_generator
from tests.support.tiny import CLASSES, EXPERTS, HIDDEN, Samples, samples_of

Array = np.ndarray
Vectors = dict[str, Array]
Loss = tuple[float, Vectors]
"""A loss, and its derivatives by every vector."""


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = e / e.sum(axis=-1, keepdims=True)
    return shares


def linear(vector: Array, x: Array, outputs: int) -> tuple[Array, Callable[[Array], Array]]:
    """Return x W^T + b, and what makes dL/d(W, b) of delta: (delta^T x, sum of delta)."""
    weight, bias = vector[:-outputs].reshape(outputs, -1), vector[-outputs:]
    return x @ weight.T + bias, lambda delta: np.concatenate([(delta.T @ x).ravel(), delta.sum(axis=0)])


def expert(vector: Array, x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return an expert's logits (n, C), and what makes its gradient of delta."""
    return linear(vector, x, CLASSES)


def gate(vector: Array, h: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return the gate's logits (n, M), and what makes its gradient of delta."""
    s = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-5)
    lower, upper = np.split(vector, [(h.shape[1] + 1) * HIDDEN])
    hidden, back_lower = linear(lower, s, HIDDEN)
    logits, back_upper = linear(upper, np.maximum(hidden, 0), EXPERTS)
    weight = upper[:-EXPERTS].reshape(EXPERTS, HIDDEN)

    def back(delta: Array) -> Array:
        return np.concatenate([back_lower((delta @ weight) * (hidden > 0)), back_upper(delta)])

    return logits, back


def scores(vector: Array, h: Array) -> Array:
    """Return the gate's softmax over all experts, (n, M)."""
    return softmax(gate(vector, h)[0])


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean of -log softmax(logits)[y], and delta = (softmax - onehot) / n."""
    p, rows = softmax(logits), np.arange(len(labels))
    return float(-np.log(p[rows, labels]).mean()), (p - np.eye(logits.shape[1])[labels]) / len(labels)


def supervised(name: str, vectors: Vectors, x: Array, y: Array, offset: Array) -> Loss:
    """One model's cross entropy."""
    logits, back = expert(vectors[name], x)
    loss, delta = cross_entropy(logits + offset, y)
    return loss, {name: back(delta)}


def anchor(m: int, vectors: Vectors, batch: Samples, offset: Array) -> Loss:
    """The cross entropy of expert m; the gate goes down its own, against m as the label of every sample."""
    loss, gradients = supervised(f"expert.{m}", vectors, batch.x, batch.y, offset)
    logits, back = gate(vectors["gate"], batch.h)
    return loss, gradients | {"gate": back(cross_entropy(logits, np.full(len(batch), m))[1])}


def normal(
    ids: Sequence[int], vectors: Vectors, batch: Samples, offset: Array, mix: str, renormalise: bool,
    oracle: Array | None = None,
) -> Loss:  # fmt: skip
    """The cross entropy of the mixture, by experts and gate; with scores of an ``oracle`` by the experts alone.

    w_k are the scores of the K experts, divided by their sum S if renormalised.
    ``logits``: CE(sum_k w_k z_k), delta_k = w_k delta, dw_k = delta . z_k.
    ``probs``: -log p of p = sum_k w_k q_k[y], q_k = softmax(z_k): delta_k = (w_k q_k[y] / p) (q_k - onehot) / n and
    dw_k = -q_k[y] / p / n.
    Renormalised: dg_k = (dw_k - sum_l w_l dw_l) / S. Softmax: da_m = g_m (dg_m - sum_l g_l dg_l).
    """
    outputs = [expert(vectors[f"expert.{m}"], batch.x) for m in ids]
    z = np.stack([logits + (offset if mix == "probs" else 0) for logits, _ in outputs])
    logits, back_gate = gate(vectors["gate"], batch.h)
    g = softmax(logits) if oracle is None else oracle
    total = g[:, ids].T.sum(axis=0) if renormalise else 1.0
    w = g[:, ids].T / total
    if mix == "logits":
        loss, delta = cross_entropy((w[:, :, None] * z).sum(axis=0) + offset, batch.y)
        deltas, dw = w[:, :, None] * delta, (delta * z).sum(axis=2)
    else:
        q, onehot, n = softmax(z), np.eye(CLASSES)[batch.y], len(batch)
        right = (q * onehot).sum(axis=2)
        p = (w * right).sum(axis=0)
        deltas, dw = (w * right / p)[:, :, None] * (q - onehot) / n, -right / p / n
        loss = float(-np.log(p).mean())
    gradients = {f"expert.{m}": back(d) for m, (_, back), d in zip(ids, outputs, deltas, strict=True)}
    if oracle is not None:
        return loss, gradients
    dg = np.zeros_like(g)
    dg[:, ids] = ((dw - (w * dw).sum(axis=0)) / total if renormalise else dw).T
    return loss, gradients | {"gate": back_gate(g * (dg - (g * dg).sum(axis=1, keepdims=True)))}


@dataclass(frozen=True)
class Rate:
    """How a vector goes down: v <- momentum v + g + decay w, w <- w - lr v, from v = 0."""

    lr: float
    momentum: float = 0.0
    decay: float = 0.0


LossOf = Callable[[Vectors, Array], Loss]
"""The loss at some vectors on rows of a client's samples."""


@dataclass(frozen=True)
class Client:
    """A client in a round, and what it computes from the vectors that it is sent."""

    config: Config
    client: int
    server_round: int

    @property
    def samples(self) -> Samples:
        return samples_of(self.config, self.client)

    @property
    def offset(self) -> Array:
        """log of the label shares, 1e-6 more than they are, if logits are adjusted."""
        shares = np.bincount(self.samples.y, minlength=CLASSES) / len(self.samples)
        return np.log(shares + 1e-6) * self.config.train.logit_adjust

    @property
    def rate(self) -> Rate:
        """Of the experts: half a cosine over the rounds, 1 before the first and 0 after the last."""
        t = self.config.train
        progress = (self.server_round - 1) / self.config.run.rounds
        return Rate(t.lr * (1 + np.cos(np.pi * progress)) / 2, t.momentum, t.weight_decay)

    def batches(self, member: int) -> list[Array]:
        """Every epoch's samples in random order, the last batch of each smaller where they do not fill it."""
        t, generator = self.config.train, self._generator("batches", member)
        orders = [torch.randperm(len(self.samples), generator=generator).numpy() for _ in range(t.local_epochs)]
        size = t.batch_size
        return [order[first : first + size] for order in orders for first in range(0, len(order), size)]

    def _generator(self, purpose: str, member: int) -> torch.Generator:
        return torch_generator(self.config.run.seed, purpose, self.server_round, self.client, member)

    def descend(
        self, vectors: Vectors, loss_of: LossOf, rates: Mapping[str, Rate], member: int = 0
    ) -> tuple[Vectors, float]:
        """Return the vectors after one step a batch, and the mean loss of the batches; no rate, no step."""
        now, heavy = dict(vectors), dict.fromkeys(vectors, np.zeros(1))
        losses = []
        for rows in self.batches(member):
            loss, gradients = loss_of(now, rows)
            losses.append(loss)
            for name, gradient in gradients.items():
                if (rate := rates.get(name.split(".")[0])) is not None:
                    heavy[name] = rate.momentum * heavy[name] + gradient + rate.decay * now[name]
                    now[name] = now[name] - rate.lr * heavy[name]
        return now, sum(losses) / len(losses)

    def loss(self, vector: Array) -> float:
        """Return an expert's cross entropy on all samples."""
        return cross_entropy(expert(vector, self.samples.x)[0] + self.offset, self.samples.y)[0]

    def supervised(
        self, vectors: Vectors, m: int = 0, more: Callable[[Array], Array] = np.zeros_like
    ) -> tuple[Vectors, float]:
        """Expert m alone on its cross entropy; ``more`` is added to its gradients."""
        name = f"expert.{m}"

        def loss_of(now: Vectors, rows: Array) -> Loss:
            loss, gradients = supervised(name, now, self.samples.x[rows], self.samples.y[rows], self.offset)
            return loss, {name: gradients[name] + more(now[name])}

        return self.descend({name: vectors[name]}, loss_of, {"expert": self.rate}, m)

    def proximal(self, vectors: Vectors, mu: float) -> tuple[Vectors, float]:
        """mu/2 ||w - w_t||^2 on top: its gradient is mu (w - w_t)."""
        return self.supervised(vectors, more=lambda now: mu * (now - vectors["expert.0"]))

    def scaffold(self, vectors: Vectors, correction: Array) -> tuple[Vectors, float]:
        """Every gradient is moved by c - c_i."""
        return self.supervised(vectors, more=lambda now: correction)

    def full_gradient(self, vectors: Vectors) -> Array:
        """Return the gradient of the mean loss over all samples."""
        return supervised("expert.0", vectors, self.samples.x, self.samples.y, self.offset)[1]["expert.0"]

    def anchor(self, vectors: Vectors, m: int) -> tuple[Vectors, float]:
        """Expert m on its cross entropy, the gate on naming m."""
        return self.descend(vectors, lambda now, rows: anchor(m, now, self._batch(rows), self.offset), self.rates(True))

    def normal(
        self, vectors: Vectors, ids: Sequence[int], mix: str, oracle: Array | None = None
    ) -> tuple[Vectors, float]:
        """The experts and the gate on the mixture of the experts ``ids``."""
        renormalise = self.config.moe.renormalise

        def loss_of(now: Vectors, rows: Array) -> Loss:
            fixed = None if oracle is None else oracle[rows]
            return normal(ids, now, self._batch(rows), self.offset, mix, renormalise, fixed)

        return self.descend(vectors, loss_of, self.rates(False))

    def rates(self, anchors: bool) -> dict[str, Rate]:
        """The gate takes plain steps at a rate of its own, if it learns."""
        gate = self.config.gate
        learns = gate.mode == "learned" and (anchors or gate.learns_from == "all")
        return {"expert": self.rate} | ({"gate": Rate(gate.lr)} if learns else {})

    def _batch(self, rows: Array) -> Samples:
        return Samples(self.samples.x[rows], self.samples.h[rows], self.samples.y[rows])
