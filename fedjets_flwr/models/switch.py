"""A Switch layer (Fedus et al. 2022): every token goes to one expert; of its experts a layer may hold only some."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drawn(*shape: int, std: float) -> nn.Parameter:
    """Return normal weights; on the meta device, where no number counts, no draw imports the compiler, for seconds."""
    made = torch.empty(shape)
    return nn.Parameter(made if made.is_meta else torch.randn(shape) * std)


class SwitchExpert(nn.Module):
    """A feed-forward network d -> hidden -> d without biases, and the row of the router that chooses it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.row = drawn(width, std=width**-0.5)
        self.up = drawn(hidden, width, std=width**-0.5)
        self.down = drawn(width, hidden, std=hidden**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        """Return down relu(up h), (n, d) of (n, d)."""
        return F.linear(F.relu(F.linear(h, self.up)), self.down)


def gates(h: Tensor, rows: Tensor) -> Tensor:
    """Return softmax over the held experts of rows . h: (n, k) of tokens (n, d) and rows (k, d)."""
    return F.linear(h, rows).softmax(dim=1)


def balance_loss(gate: Tensor, position: Tensor) -> Tensor:
    """Return k sum_j f_j g_j: 1 where all k experts get alike, k where one gets all.

    Args:
        gate: of n tokens, (n, k).
        position: of the expert that each token went to, among the k, (n,); f_j is the share of expert j.
    """
    experts = gate.shape[1]
    shares = torch.bincount(position, minlength=experts).to(gate.dtype) / len(position)
    return experts * (shares * gate.mean(dim=0)).sum()


def switch(h: Tensor, experts: Mapping[int, SwitchExpert]) -> tuple[Tensor, Tensor, Tensor]:
    """Send each token to the held expert with the largest gate, the lowest id among equals; no token is dropped.

    Args:
        h: tokens, (n, d).
        experts: those held, by id in ascending order.

    Returns:
        g_j FFN_j(h) of each token's expert j, (n, d); the ids j, (n,) int64; the load-balance loss, a scalar.
    """
    gate = gates(h, torch.stack([expert.row for expert in experts.values()]))
    position = gate.argmax(dim=1)
    # Each expert works once, on its own tokens one after the other.
    order = position.argsort(stable=True)
    sizes = torch.bincount(position, minlength=len(experts)).tolist()
    parts = [expert(part) for expert, part in zip(experts.values(), h[order].split(sizes), strict=True)]
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    out = torch.cat(parts)[back] * gate.gather(1, position[:, None])
    ids = torch.tensor(list(experts), device=h.device)[position]
    return out, ids, balance_loss(gate, position)


class _Beside(torch.autograd.Function):
    """Passes a tensor on, and has a second loss trained along with whatever is made of the tensor."""

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), device=gradients[0].device)


def trained_beside(x: Tensor, loss: Tensor) -> Tensor:
    """Return ``x``; a backward pass through it also adds the gradient of the scalar ``loss``.

    So a model's own loss needs no way out of the model, and what is reported is the task's loss alone.
    """
    beside: Tensor = _Beside.apply(x, loss)
    return beside
