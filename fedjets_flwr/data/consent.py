"""What a client keeps out of the federation: all its samples (it opts out), or some (Listo Zec et al. 2020).

What is kept out trains the client's own models alone. Where a split draws with replacement between clients, as all but
``majority`` do, another client may hold the same sample and share it.
"""

import numpy as np

from fedjets_flwr.config.schema import Config
from fedjets_flwr.seeds import numpy_generator


def opted_out(config: Config) -> frozenset[int]:
    """Return the training clients that take no part: ``partition.opt-out`` of them, all of a smaller share's too."""
    part = config.partition
    order = numpy_generator(config.run.seed, "opt-out").permutation(part.clients)
    return frozenset(order[: round(part.opt_out * part.clients)].tolist())


def shared(config: Config, client: int, samples: np.ndarray) -> np.ndarray:
    """Return which of a training client's samples take part, in their order: all but ``partition.private-share``."""
    if client in opted_out(config):
        return samples[:0]
    order = numpy_generator(config.run.seed, "private samples", client).permutation(len(samples))
    return samples[np.sort(order[round(config.partition.private_share * len(samples)) :])]
