"""Differential privacy of the clients' updates, added at the server, and of the expert ids that clients upload.

Each round every client's update of each vector is clipped to ``privacy.clip-norm`` = C and Gaussian noise of standard
deviation z C sqrt(v) is added to each vector's sum, z = ``privacy.noise-multiplier``. A client moves at most v vectors
(FedJETs: K experts and the gate), so its whole contribution has norm at most C sqrt(v). Replacing one client's data by
another's moves the sums by at most twice that, hence the accountant sees Gaussians of multiplier z / 2.

The unit is a client. Two epsilons are told. The main one composes every round a client may join and holds even for a
reader who knows the cohorts (``metrics.jsonl`` and ``run.seed`` give them away). The amplified one credits the random
draw of cohorts and holds only for a reader who does not know them. Both assume that the reader knows which experts a
client trained; what that choice tells is apart: without ``privacy.route-epsilon`` the ids, and how often an expert is
trained, are exact and tell of a client's labels. Losses and counts in ``metrics.jsonl`` are exact too.
"""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedjets_flwr.config import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.seeds import torch_generator


class PrivateMeans:
    """Equal-weight means of clipped updates with Gaussian noise on their sums.

    The noise is drawn from a key that only the server knows; ``run.seed`` is known to every client.
    """

    def __init__(
        self, old: Mapping[str, Tensor], config: Config, server_round: int, vectors_moved: int, key: int
    ) -> None:
        self.counts: dict[str, int] = {}
        self._old, self._config, self._round, self._moved, self._key = old, config, server_round, vectors_moved, key
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
            generator = torch_generator(self._key, "privacy", self._round, position)
            noise = scale * torch.randn(total.shape, generator=generator)
            means[name] = self._old[name] + (total + noise) / self.counts[name]
        return means


def noise_key(folder: Path) -> int:
    """Return the run's secret key, made once and kept in its folder with mode 0600, so that a resumed run goes on."""
    path = folder / ".noise-key"
    if not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(str(secrets.randbits(128)))
    return int(path.read_text())


def spent(config: Config, sampling: str) -> dict[str, float]:
    """Return the total epsilons of a run at ``privacy.delta``, for normal clients and for anchors.

    Args:
        config: the settings.
        sampling: how cohorts are drawn (see :func:`server_app.cohort.draw_cohort`).

    Returns:
        ``epsilon_*`` for a reader who knows the cohorts, ``epsilon_*_secret_cohorts`` for one who does not (equal for
        an anchor that joins every round), and ``route_epsilon``, what a client's uploaded ids add in all rounds.

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

    def epsilon(population: int, drawn: int, secret: bool) -> float:
        if drawn == 0:
            return 0.0
        gaussian = dp_accounting.GaussianDpEvent(config.privacy.noise_multiplier / 2)
        events = [gaussian]
        if secret and drawn < population:
            events.append(dp_accounting.SampledWithoutReplacementDpEvent(population, drawn, gaussian))
        found = []
        for event in events:  # the bound with sampling is not always the smaller one
            accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
            accountant.compose(event, config.run.rounds)
            found.append(float(accountant.get_epsilon(config.privacy.delta)))
        return min(found)

    c, clients, anchors = config.cohort, config.partition.clients, config.num_anchors
    pools = {"normal": (clients - anchors, c.normals), "anchor": (anchors, c.anchors)}
    if sampling == "uniform":
        pools = dict.fromkeys(pools, (clients, min(c.anchors + c.normals, clients)))
    told = {f"epsilon_{role}": epsilon(*pool, secret=False) for role, pool in pools.items()}
    told |= {f"epsilon_{role}_secret_cohorts": epsilon(*pool, secret=True) for role, pool in pools.items()}
    return told | {"delta": config.privacy.delta, "route_epsilon": config.privacy.route_epsilon * config.run.rounds}


def randomise(chosen: Sequence[int], experts: int, epsilon: float, rng: np.random.Generator) -> tuple[int, ...]:
    """Return the chosen ids, or a uniformly random set of as many, by randomised response (Warner 1965).

    The true set is kept with probability (e^eps - 1) / (e^eps - 1 + n), n = the number of sets, so that any answer is
    at most e^eps times as likely under one set as under another; epsilon 0 turns it off.
    """
    if epsilon == 0:
        return tuple(chosen)
    # In ascending order, whichever set it is: the order of the gate's scores would tell the true one.
    sets = math.comb(experts, len(chosen))
    if rng.random() < math.expm1(epsilon) / (math.expm1(epsilon) + sets):
        return tuple(sorted(chosen))
    return tuple(sorted(int(m) for m in rng.choice(experts, len(chosen), replace=False)))
