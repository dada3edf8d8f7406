"""Noise of a site's own on what it trained, so that nobody, the server included, sees the update itself.

The change of all vectors of a reply together is clipped to the policy's norm C, and Gaussian noise of deviation z C is
added to every number of it. Any two data sets of the site move what leaves it by 2 C at most, so each release counts as
a Gaussian of multiplier z / 2, as the server's own do. Sample counts, losses and expert ids are exact all the same.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from client_app.client import ClientContext, Update
from client_app.policy import Noise, Refused
from fedjets_flwr.data.site_cache import site_name
from fedjets_flwr.federation.privacy import Ledger, Release, privatised, spent

log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Spent:
    """What a release of a client's tells, and what all of them tell together."""

    epsilon: float
    releases: int
    epsilon_in_total: float
    delta: float


def with_noise(
    noise: Noise, context: ClientContext, sent: Mapping[str, Tensor], update: Update
) -> tuple[Update, Spent]:
    """Return an update that may leave, and what it costs, which was counted on the site's disk.

    Raises:
        Refused: it holds what noise would break, or what is no change of a vector that was sent.
    """
    if alone := sorted(set(update.vectors) - set(sent)):
        raise Refused(f"noise: {alone[0]} is no change of a vector that was sent")
    if any(spec.size > spec.trained for spec in context.runtime.specs):
        raise Refused("noise: it would break batch norm's variances; set model.norm = 'group' in the run")
    vectors = privatised(update.vectors, sent, noise.clip_norm, noise.noise_multiplier)
    cost = _count(noise, context)
    log.info(
        "client %d: noise on its update: epsilon %.4g, of all its %d releases %.4g, at delta %g",
        context.client, cost.epsilon, cost.releases, cost.epsilon_in_total, cost.delta,
    )  # fmt: skip
    return replace(update, vectors=vectors), cost


def _count(noise: Noise, context: ClientContext) -> Spent:
    """Count a release, and return what it and all releases so far tell of this site, whichever client it was."""
    own = context.runtime.own
    name = f"client-{context.client}" if own is None else site_name(own)
    folder = context.config.cache_dir / "local-privacy" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ledger, release = Ledger(folder), Release(noise.noise_multiplier, (1, 1), (1, 0))
    ledger.sums(context.server_round, release)
    one = spent([release], {}, noise.delta)["epsilon_normal"]
    total = spent(*ledger.read(), noise.delta)
    return Spent(one, int(total["releases"]), total["epsilon_normal"], noise.delta)
