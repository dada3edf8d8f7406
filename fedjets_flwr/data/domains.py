"""Domains: how images look. Each is a fixed change of 8-bit images; what it draws is drawn once per image and seed.

Severities 1 to 5 are those of CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv 1903.12261; the authors' script for images
of 32 x 32); rotations are those of rotated CIFAR. More are a function and a line here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import TRAIN, UNSEEN, VALIDATION
from fedjets_flwr.seeds import torch_generator

if TYPE_CHECKING:
    from fedjets_flwr.config.schema import Config

Change = Callable[[Tensor, float, Sequence[torch.Generator]], Tensor]
"""uint8 images (n, c, h, w), the strength, and a generator for each image -> images of the same kind."""


def _as_is(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    return pixels


def _rotated(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    return torch.rot90(pixels, round(strength / 90), (2, 3)).contiguous()


def _negative(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    return 255 - pixels


def _grey(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional as vision

    return vision.rgb_to_grayscale(pixels, num_output_channels=3) if pixels.shape[1] == 3 else pixels


def _noise(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    drawn = torch.stack([torch.randn(pixels.shape[1:], generator=generator) for generator in draws])
    return _eight_bits(pixels + 255 * strength * drawn)


def _blur(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional as vision

    reach = min(max(1, round(3 * strength)), min(pixels.shape[2:]) - 1)  # the border is mirrored once
    blurred: Tensor = vision.gaussian_blur(pixels, [2 * reach + 1] * 2, [strength] * 2)
    return blurred


def _contrast(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    mean = pixels.float().mean(dim=(2, 3), keepdim=True)
    return _eight_bits((pixels - mean) * strength + mean)


def _jpeg(pixels: Tensor, strength: float, draws: Sequence[torch.Generator]) -> Tensor:
    from torchvision.transforms.v2 import functional as vision

    return torch.stack([vision.jpeg(image, int(strength)) for image in pixels])


def _eight_bits(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Kind:
    """A registered change: what it does, and its strengths at severities 1 to 5, or the only one.

    ``draws``: by chance; ``whole``: a strength is a whole number.
    """

    change: Change
    strengths: tuple[float, ...]
    draws: bool = False
    whole: bool = False


KINDS: dict[str, Kind] = {
    "as-is": Kind(_as_is, (0,)),
    "rotate-90": Kind(_rotated, (90,)),
    "rotate-180": Kind(_rotated, (180,)),
    "rotate-270": Kind(_rotated, (270,)),
    "negative": Kind(_negative, (0,)),
    "grey": Kind(_grey, (0,)),
    "noise": Kind(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), draws=True),
    "blur": Kind(_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": Kind(_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": Kind(_jpeg, (80, 65, 58, 50, 40), whole=True),
}


@dataclass(frozen=True)
class Domain:
    """A domain of the settings, by its name there: ``blur``, ``blur:3`` for a severity, ``blur=1.6`` for a strength."""

    name: str
    kind: Kind
    strength: float

    def of(self, pixels: Tensor, indices: Sequence[int], seed: int) -> Tensor:
        """Return images (n, c, h, w) uint8 as they look in this domain.

        Args:
            pixels: as they are.
            indices: what tells each from others of the same seed.
            seed: root of what is drawn.
        """
        what = f"domain {re.split('[:=]', self.name)[0]}"  # the same of all strengths
        draws = [torch_generator(seed, what, index) for index in indices] if self.kind.draws else []
        return self.kind.change(pixels, self.strength, draws)


def parse_domain(text: str) -> Domain:
    """Return the domain that a word of ``partition.domains`` names.

    Raises:
        FedjetsError: there is no such domain, severity or strength.
    """
    where = f"partition.domains: {text!r}"
    for mark in ":=":
        name, found, number = text.partition(mark)
        if not found:
            continue
        kind = _kind(name, where)
        try:
            strength = kind.strengths[(1, 2, 3, 4, 5).index(int(number))] if mark == ":" else float(number)
        except (ValueError, IndexError):
            strength = -1.0
        if len(kind.strengths) == 1 or not 0 < strength <= 100 or (kind.whole and strength % 1):
            raise FedjetsError(f"{where}: {name} has no such {'severity' if mark == ':' else 'strength'}")
        return Domain(text, kind, strength)
    kind = _kind(text, where)
    return Domain(text, kind, kind.strengths[-1])


def _kind(name: str, where: str) -> Kind:
    if name not in KINDS:
        raise FedjetsError(f"{where}: no such domain; there are {', '.join(KINDS)}")
    return KINDS[name]


def domains_of(config: "Config") -> tuple[Domain, ...]:
    """Return the domains of the settings; none, if clients do not differ in them."""
    if config.partition.name != "domains":
        return ()
    return tuple(parse_domain(name) for name in config.domain_names)


def domains_held(config: "Config", client: int) -> tuple[int, ...]:
    """Return the domains that a client's images are of, in turn, as positions in ``partition.domains``.

    Clients that train hold one each, the first ones (the anchors) all in turn, and never ``partition.held-out-domain``,
    which then all unseen clients hold. Unseen clients hold ``partition.unseen-domains``, in mixtures that differ, and
    validation clients as many, of those that are trained on, in the mixtures that come next.
    """
    part, names, role = config.partition, config.domain_names, config.partition.role_of(client)
    trained = [position for position, name in enumerate(names) if name != part.held_out_domain]
    if role == TRAIN:
        return (trained[client % len(trained)],)
    if role == UNSEEN and len(trained) < len(names):
        return tuple(set(range(len(names))) - set(trained))
    since = client - part.clients
    if role == VALIDATION:
        since += -part.unseen_clients % len(trained)  # all domains from the first on, and no mixture of before
    turn, first = divmod(since, len(trained))
    others = [(first + step) % len(trained) for step in range(1, len(trained))]
    mixed = [others[(turn + position) % len(others)] for position in range(min(part.unseen_domains - 1, len(others)))]
    return tuple(trained[position] for position in (first, *mixed))


def as_held(config: "Config", client: int, pixels: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a client's images (n, c, h, w) as they look at it, and the domain of each, (n,) int64."""
    domains, held = domains_of(config), domains_held(config, client)
    kinds = torch.tensor(held).repeat(-(-len(pixels) // len(held)))[: len(pixels)]
    looks = pixels.clone()
    for position in set(held):
        rows = (kinds == position).nonzero().flatten()
        looks[rows] = domains[position].of(pixels[rows], [indices[row] for row in rows.tolist()], config.run.seed)
    return looks, kinds
