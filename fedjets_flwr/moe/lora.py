"""Finding out which experts a text activates without changing a weight: low-rank adapters (LoRA, Hu et al. 2021)."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedjets_flwr.models.transformer import Transformer


class LoraProbe(nn.Module):
    """A frozen transformer whose experts and router rows have trainable changes: W + B A, B = 0 at the start.

    Its parameters are the changes alone; the weights below are a copy that nothing writes to. The scale s / r is 1, and
    the load-balance loss is off.
    """

    def __init__(self, model: Transformer, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        frozen = copy.deepcopy(model).requires_grad_(False)
        frozen.balance = 0.0
        self._frozen = [frozen]  # in a list, so that it is no part of this module
        self.names: list[str] = []
        self.a, self.b, self.rows = nn.ParameterList(), nn.ParameterList(), nn.ParameterDict()
        for name, weight in frozen.experts.named_parameters(prefix="experts"):
            if weight.dim() == 1:
                self.rows[name.replace(".", "/")] = nn.Parameter(weight.clone())
                continue
            outputs, inputs = weight.shape
            start = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            self.names.append(name)
            self.a.append(nn.Parameter(start.to(weight.device)))
            self.b.append(nn.Parameter(torch.zeros(outputs, rank, device=weight.device)))

    @property
    def frozen(self) -> Transformer:
        """The model below, which counts where tokens went."""
        return self._frozen[0]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (b, t, V) of the changed model."""
        below = dict(self.frozen.named_parameters())
        changed = {name: below[name] + b @ a for name, a, b in zip(self.names, self.a, self.b, strict=True)}
        changed |= {name.replace("/", "."): row for name, row in self.rows.items()}
        logits: Tensor = functional_call(self.frozen, changed, (tokens,))
        return logits


def probe_floats(width: int, hidden: int, experts: int, rank: int) -> int:
    """Return the floats that a probe trains: of each expert two pairs of adapters and its row.

    Args:
        width: d of the model.
        hidden: units of an expert.
        experts: over all layers.
        rank: of the adapters.
    """
    return experts * (2 * rank * (width + hidden) + width)
