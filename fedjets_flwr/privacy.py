"""Differential privacy of the clients' updates, added at the server, and of the expert ids that clients upload.

Each round every client's update of each vector is clipped to ``privacy.clip-norm`` = C and Gaussian noise of standard
deviation z C sqrt(v) is added to each vector's sum, z = ``privacy.noise-multiplier``. A client moves at most v vectors
(FedJETs: K experts and the gate), so its whole contribution has norm at most C sqrt(v). Replacing one client's data by
another's moves the sums by at most twice that, hence the accountant sees Gaussians of multiplier z / 2.

The unit is a client; epsilon covers the weights of all rounds, for a reader who knows which experts each client
trained. What that choice tells is apart: without ``privacy.route-epsilon`` the ids, and how often an expert is
trained, are exact and tell of a client's labels. An anchor that joins every round gets no amplification by sampling.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedjets_flwr.config import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.seeds import torch_generator


class PrivateMeans:
    """Equal-weight means of clipped updates with Gaussian noise on their sums; the noise is drawn from the root seed.

    A published seed would give the noise away: in earnest, keep ``run.seed`` secret.
    """

    def __init__(self, old: Mapping[str, Tensor], config: Config, server_round: int, vectors_moved: int) -> None:
        self.counts: dict[str, int] = {}
        self._old, self._config, self._round, self._moved = old, config, server_round, vectors_moved
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Fold in one client's clipped update; weights do not count, since they would tell of a client."""
        update = vector - self._old[name]
        update = update * min(1.0, self._config.privacy.clip_norm / max(float(update.norm()), 1e-12))
        self._sums[name] = self._sums[name] + update if name in self._sums else update
        self.counts[name] = self.counts.get(name, 0) + 1

    def result(self) -> dict[str, Tensor]:
        """Return old + (sum + noise) / clients."""
        p = self._config.privacy
        scale = p.noise_multiplier * p.clip_norm * math.sqrt(self._moved)
        means = {}
        for position, (name, total) in enumerate(sorted(self._sums.items())):
            generator = torch_generator(self._config.run.seed, "privacy", self._round, position)
            noise = scale * torch.randn(total.shape, generator=generator)
            means[name] = self._old[name] + (total + noise) / self.counts[name]
        return means


def spent(config: Config, sampling: str) -> dict[str, float]:
    """Return the total epsilon of a run at ``privacy.delta``, for normal clients and for anchors.

    Args:
        config: the settings.
        sampling: how cohorts are drawn (see :func:`server_app.cohort.draw_cohort`).

    Raises:
        FedjetsError: the accountant is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise FedjetsError(
            "privacy.noise-multiplier: its accountant is missing; pip install 'fedjets-flwr[privacy]'"
        ) from None

    def epsilon(population: int, drawn: int) -> float:
        if drawn == 0:
            return 0.0
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(config.privacy.noise_multiplier / 2)
        if drawn < population:
            event = dp_accounting.SampledWithoutReplacementDpEvent(population, drawn, event)
        accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        accountant.compose(event, config.run.rounds)
        return float(accountant.get_epsilon(config.privacy.delta))

    c, clients, anchors = config.cohort, config.partition.clients, config.num_anchors
    if sampling == "uniform":
        everyone = epsilon(clients, min(c.anchors + c.normals, clients))
        normal, anchor = everyone, everyone
    else:
        normal, anchor = epsilon(clients - anchors, c.normals), epsilon(anchors, c.anchors)
    return {"epsilon_normal": normal, "epsilon_anchor": anchor, "delta": config.privacy.delta}


def randomise(chosen: Sequence[int], experts: int, epsilon: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Return the chosen ids, or a uniformly random set of as many, by randomised response (Warner 1965).

    The true set is kept with probability (e^eps - 1) / (e^eps - 1 + n), n = the number of sets, so that any answer is
    at most e^eps times as likely under one set as under another; epsilon 0 turns it off.
    """
    if epsilon == 0:
        return tuple(chosen)
    sets = math.comb(experts, len(chosen))
    if rng.random() < math.expm1(epsilon) / (math.expm1(epsilon) + sets):
        return tuple(chosen)
    return tuple(sorted(int(m) for m in rng.choice(experts, len(chosen), replace=False)))
