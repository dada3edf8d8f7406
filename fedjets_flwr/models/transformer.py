"""A decoder-only language model, pre-norm, whose last layers are Switch layers (FedMoE, arXiv 2408.11304).

What all clients share comes first in its vector, then every expert with its row of the router, layer by layer. So the
vectors ``dense`` and ``expert.<layer>.<id>`` of a model, one after the other, are its whole vector, and a model that
holds only some experts has the same layout without the others.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedjets_flwr.config.sections import MOST_PARTS
from fedjets_flwr.models.switch import SwitchExpert, drawn, switch, trained_beside
from fedjets_flwr.names import DENSE, switch_expert_name

Sets = tuple[tuple[int, ...], ...]
"""The experts that are held in each Switch layer, ascending ids."""

LARGEST = 2**20
"""Of any size in an architecture: one that only a damaged file or message claims must not keep a process busy."""


@dataclass(frozen=True)
class LanguageArchitecture:
    """What determines a language model's layout.

    Attributes:
        vocabulary: tokens V.
        context: tokens that it sees at once, T.
        width: d.
        heads: of attention; they divide d.
        layers: of attention and feed-forward network.
        switch_layers: the last so many layers have experts, L.
        experts: of each of them, E.
        hidden: units of each feed-forward network.
        balance: weight of the load-balance loss in training; a file tells none.
        held: experts of each Switch layer that a client's model has; empty: all.
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int
    switch_layers: int
    experts: int
    hidden: int
    balance: float = field(default=0.0, repr=False)
    held: Sets = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse sizes that no model has.

        Raises:
            ValueError: names what is wrong.
        """
        sizes = (self.vocabulary, self.context, self.width, self.heads, self.layers, self.switch_layers, self.experts)
        if not all(1 <= size <= LARGEST for size in (*sizes, self.hidden)):
            raise ValueError(f"a size that is not from 1 to {LARGEST}")
        if self.width % self.heads or self.switch_layers > self.layers:
            raise ValueError("heads must divide the width, and no more layers have experts than there are")
        if self.layers + self.switch_layers * self.experts > MOST_PARTS:
            raise ValueError(f"more than {MOST_PARTS} layers and experts")
        if self.held and (
            len(self.held) != self.switch_layers
            or not all(ids and list(ids) == sorted(set(ids) & set(range(self.experts))) for ids in self.held)
        ):
            raise ValueError("held experts that are not ascending ids, at least one for each Switch layer")

    @property
    def sets(self) -> Sets:
        """The experts held, all of them where nothing else is said."""
        return self.held or whole(self)

    @property
    def num_classes(self) -> int:
        """What the model chooses among: the tokens."""
        return self.vocabulary

    @property
    def channels(self) -> int:
        """0: it reads no images."""
        return 0


def whole(architecture: LanguageArchitecture) -> Sets:
    """Return the sets of a model that holds every expert."""
    return (tuple(range(architecture.experts)),) * architecture.switch_layers


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Return (b, t, d) of (b, t, d); a token sees those before it and itself."""
        b, t, d = h.shape
        q, k, v = self.inputs(h).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.output(seen.transpose(1, 2).reshape(b, t, d))
        return mixed


class Block(nn.Module):
    """One layer up to its feed-forward network: ``h + attention``, and the normalised input of what comes after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention, self.second = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention, and what the feed-forward network reads, (b, t, d) each."""
        h = h + self.attention(self.norm(h))
        return h, self.second(h)


class FeedForward(nn.Module):
    """The network of a layer without experts, d -> hidden -> d."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return (..., d) of (..., d)."""
        out: Tensor = self.down(F.relu(self.up(h)))
        return out


class Transformer(nn.Module):
    """The model: tokens (b, t) int64 -> logits of the next ones, (b, t, V).

    Behind the last token of a row there may be numbers below 0, padding: no expert sees it, and it is counted nowhere.

    Attributes:
        sent: tokens that went to each expert since it was last set to zero, (L, E) int64; 0 for one that is not held.
        balance: weight of the load-balance loss in training mode.
    """

    def __init__(self, a: LanguageArchitecture) -> None:
        super().__init__()
        self.architecture, self.balance = a, a.balance
        self.embedding = drawn(a.vocabulary, a.width, std=0.02)
        self.positions = drawn(a.context, a.width, std=0.02)
        self.blocks = nn.ModuleList(Block(a.width, a.heads) for _ in range(a.layers))
        self.networks = nn.ModuleList(FeedForward(a.width, a.hidden) for _ in range(a.layers - a.switch_layers))
        self.norm = nn.LayerNorm(a.width)
        # Last: what comes before is what all clients share.
        self.experts = nn.ModuleList(
            nn.ModuleDict({str(m): SwitchExpert(a.width, a.hidden) for m in ids}) for ids in a.sets
        )
        self.sent = torch.zeros(a.switch_layers, a.experts, dtype=torch.int64)

    def held(self, layer: int) -> dict[int, SwitchExpert]:
        """Return the experts of a Switch layer by id."""
        return {int(m): expert for m, expert in self.experts[layer].items()}  # type: ignore[operator]

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits; in training mode a backward pass also trains the load balance of each Switch layer."""
        there = tokens >= 0
        h = F.embedding(tokens.clamp(min=0), self.embedding) + self.positions[: tokens.shape[1]]
        dense = len(self.networks)
        for number, block in enumerate(self.blocks):
            h, x = block(h)
            h = h + (self.networks[number](x) if number < dense else self._switched(number - dense, x, there))
        logits: Tensor = F.linear(self.norm(h), self.embedding)
        return logits

    def _switched(self, layer: int, x: Tensor, there: Tensor) -> Tensor:
        out, ids, balance = switch(x[there], self.held(layer))
        self.sent[layer] += torch.bincount(ids, minlength=self.architecture.experts).cpu()
        if self.training and self.balance:
            out = trained_beside(out, self.balance * balance)
        return out.new_zeros(x.shape).masked_scatter(there[..., None], out)


def language_model(architecture: LanguageArchitecture) -> nn.Sequential:
    """Return a model whose weights torch's own generator draws."""
    return nn.Sequential(OrderedDict(transformer=Transformer(architecture)))


def transformer_of(model: nn.Module) -> Transformer:
    """Return the transformer in a model of :func:`language_model`."""
    (found,) = model.children()
    assert isinstance(found, Transformer)
    return found


# Vectors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Floats of what all clients share, and of one expert with its row of the router."""

    dense: int
    expert: int

    def of(self, experts: int) -> int:
        """Return the floats of a model that holds so many experts."""
        return self.dense + experts * self.expert


@lru_cache(maxsize=64)
def sizes_of(architecture: LanguageArchitecture) -> Sizes:
    """Return the floats of the parts of a model; no memory is taken."""
    with torch.device("meta"):
        one = Transformer(replace(architecture, held=((0,),) * architecture.switch_layers))
    expert = sum(p.numel() for p in one.held(0)[0].parameters())
    total = sum(p.numel() for p in one.parameters())
    return Sizes(total - architecture.switch_layers * expert, expert)


def members(sets: Sets) -> Iterator[tuple[int, int]]:
    """Yield (layer, expert) of every expert that is held, in the order in which a vector holds them."""
    return ((layer, m) for layer, ids in enumerate(sets) for m in ids)


def vector_names(sets: Sets) -> tuple[str, ...]:
    """Return the names of the vectors of a model, in the order in which its own vector holds them."""
    return (DENSE, *(switch_expert_name(layer, m) for layer, m in members(sets)))


def sets_of(names: Iterable[str], layers: int) -> Sets:
    """Return the sets that names of vectors mean.

    Raises:
        ValueError: a name of no expert.
    """
    found: list[list[int]] = [[] for _ in range(layers)]
    for name in names:
        if name != DENSE:
            _, layer, m = name.split(".")
            found[int(layer)].append(int(m))
    return tuple(tuple(sorted(ids)) for ids in found)


def joined(vectors: Mapping[str, Tensor], sets: Sets) -> Tensor:
    """Return the vector of a model that holds ``sets``, out of the vectors of its parts."""
    return torch.cat([vectors[name] for name in vector_names(sets)])


def parted(vector: Tensor, architecture: LanguageArchitecture) -> dict[str, Tensor]:
    """Return the vectors of a model's parts by name: the inverse of :func:`joined`."""
    names, sizes = vector_names(architecture.sets), sizes_of(architecture)
    parts: Sequence[Tensor] = vector.split([sizes.dense, *[sizes.expert] * (len(names) - 1)])
    return dict(zip(names, parts, strict=True))
