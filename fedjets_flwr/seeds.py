"""Every random draw comes from a generator that is derived here.

A draw depends on (seed, purpose, ids) alone, never on what was drawn before it, so results do not change with the
number of nodes, with the order of replies, or when a run is resumed.
"""

import hashlib

import numpy as np
import torch


def derive(seed: int, purpose: str, *ids: int) -> int:
    """Return a 63-bit seed for one purpose, e.g. ``derive(seed, "batches", server_round, client)``."""
    text = ":".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, purpose: str, *ids: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator for one purpose (see :func:`derive`)."""
    return torch.Generator(device=device).manual_seed(derive(seed, purpose, *ids))


def numpy_generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """Return a NumPy generator for one purpose (see :func:`derive`)."""
    return np.random.default_rng(derive(seed, purpose, *ids))


def seed_layers(value: int) -> None:
    """Seed what layers that draw, dropout alone, draw from: torch's own generators.

    Without a GPU ``torch.manual_seed`` notes who called it, for the day that there is one; that took a fifth of what a
    small client takes.
    """
    if torch.cuda.is_available():
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)
