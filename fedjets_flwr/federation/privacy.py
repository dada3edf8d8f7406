"""Differential privacy of the clients' updates, added at the server, and of the expert ids that clients upload.

Each round every client's update of each vector is clipped to ``privacy.clip-norm`` = C and Gaussian noise of standard
deviation z C sqrt(v) is added to each vector's sum, z = ``privacy.noise-multiplier``. A client moves at most v vectors
(FedJETs: K experts and the gate), so its whole contribution has norm at most C sqrt(v). Replacing one client's data by
another's moves the sums by at most twice that, hence the accountant sees Gaussians of multiplier z / 2.

This is central privacy: the server sees every raw update and is trusted with it; whoever sees only the models that it
gives out is bounded by epsilon. Noise is fresh in every process, and nothing of it is kept: noise that can be had again
can be taken off again, and the difference of two sums of the same noise is a client's update. So a resumed run does not
end with the bits of an unbroken one, and a round done again is one more release: :class:`Ledger` counts them all.

The unit is a client. Two epsilons are told. The main one composes every release a client may be part of and holds even
for a reader who knows the cohorts (``metrics.jsonl`` and ``run.seed`` give them away). The amplified one credits the
random draw of cohorts and holds only for a reader who does not know them. Both assume that the reader knows which
experts a client trained; what that choice tells is apart: without ``privacy.route-epsilon`` the ids, and how often an
expert is trained, are exact and tell of a client's labels. Losses and counts in ``metrics.jsonl`` are exact too.
"""

import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Privacy
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.claim import LEDGER


class PrivateMeans:
    """Equal-weight means of clipped updates with Gaussian noise on their sums."""

    def __init__(self, old: Mapping[str, Tensor], settings: Privacy, vectors_moved: int) -> None:
        """Begin a round that starts from the vectors ``old``, of which a client moves ``vectors_moved`` at most."""
        self.counts: dict[str, int] = {}
        self._old, self._clip_norm = old, settings.clip_norm
        self._deviation = settings.noise_multiplier * settings.clip_norm * math.sqrt(vectors_moved)
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, vector: Tensor, weight: float) -> None:
        """Fold in one client's clipped update; weights do not count, since they would tell of a client."""
        update = vector - self._old[name]
        update = update * min(1.0, self._clip_norm / max(float(update.norm()), 1e-12))
        self._sums[name] = self._sums[name] + update if name in self._sums else update
        self.counts[name] = self.counts.get(name, 0) + 1

    def result(self) -> dict[str, Tensor]:
        """Return old + (sum + noise) / clients; every call draws noise of its own, and is a release of its own."""
        rng = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
        return {
            name: self._old[name] + (total + self._deviation * _normal(rng, total)) / self.counts[name]
            for name, total in self._sums.items()
        }


def privatised(
    vectors: Mapping[str, Tensor], old: Mapping[str, Tensor], clip_norm: float, noise_multiplier: float
) -> dict[str, Tensor]:
    """Return one client's vectors, their whole change clipped, with noise of deviation z C on every number of it.

    The noise is fresh at every call, as that of :class:`PrivateMeans`.
    """
    changes = {name: vector.detach().cpu() - old[name] for name, vector in vectors.items()}
    norm = math.sqrt(sum(float(change.double().square().sum()) for change in changes.values()))
    scale, deviation = min(1.0, clip_norm / max(norm, 1e-12)), noise_multiplier * clip_norm
    rng = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))
    return {name: old[name] + scale * change + deviation * _normal(rng, change) for name, change in changes.items()}


def _normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    return torch.from_numpy(rng.standard_normal(like.shape, dtype=np.float32))


def check_private(config: Config, protected: bool, model_settings_count: bool) -> None:
    """Find settings that would break the promise of ``privacy.noise-multiplier``, which is on.

    Args:
        config: the settings.
        protected: whether clipping and noise on the sums protect all that the method keeps.
        model_settings_count: whether ``model.*`` describes the experts, and not a common expert's file.

    Raises:
        FedjetsError: names the setting.
    """
    noise = f"privacy.noise-multiplier = {config.privacy.noise_multiplier:g}"
    share = 1 / config.partition.clients
    rules = [
        (
            protected,
            f"{noise}: not for strategy.name = {config.strategy.name!r}, whose state tells more than clipped sums; set"
            " it to 0",
        ),
        (
            config.cohort.anchor_selection == "partition",
            f"cohort.anchor-selection = {config.cohort.anchor_selection!r}: clients would send mean embeddings without"
            " noise; with privacy.noise-multiplier set it to 'partition'",
        ),
        (
            config.aggregation.rule == "mean",
            f"aggregation.rule = {config.aggregation.rule!r}: with privacy.noise-multiplier updates are clipped and"
            " averaged; set it to 'mean'",
        ),
        (
            config.partition.opt_out == 0,
            f"partition.opt-out = {config.partition.opt_out:g}: with privacy.noise-multiplier the chance to be drawn is"
            " told of all clients; set it to 0, and lower partition.clients",
        ),
        (
            config.privacy.delta < share,
            f"privacy.delta = {config.privacy.delta:g}: allows to give a whole client away; set it below"
            f" 1 / partition.clients = {share:g}",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise FedjetsError(message)
    if model_settings_count:
        check_noise_fits(config, config.model.norm == "batch" and config.moe.trainable != "head")


def check_noise_fits(config: Config, running_statistics: bool) -> None:
    """Refuse experts whose vectors hold running statistics: noise makes variances negative, and answers NaN.

    Raises:
        FedjetsError: they do.
    """
    if running_statistics:
        raise FedjetsError(
            f"privacy.noise-multiplier = {config.privacy.noise_multiplier:g}: noise would make running variances of"
            " batch norm negative; set model.norm = 'group', or moe.trainable = 'head'"
        )


@dataclass(frozen=True)
class Release:
    """A noisy release of the sums: the multiplier z, and (population, drawn) of normal clients and of anchors."""

    noise_multiplier: float
    normal: tuple[int, int]
    anchor: tuple[int, int]


def release_of(config: Config, sampling: str) -> Release:
    """Return what one round of a run releases; ``sampling`` as in :func:`federation.cohort.draw_cohort`."""
    c, clients, anchors = config.cohort, config.partition.clients, config.num_anchors
    z = config.privacy.noise_multiplier
    if sampling == "uniform":
        both = (clients, min(c.anchors + c.normals, clients))
        return Release(z, both, both)
    if sampling == "one-per-domain":  # what counts is the domain of the fewest clients
        one = (max(1, clients // len(config.text_domains)), 1)
        return Release(z, one, one)
    return Release(z, (clients - anchors, c.normals), (anchors, c.anchors))


class Ledger:
    """All that a run's folder ever let out, one JSON object a line, each on the disk before what it counts gets out.

    It outlives resumes and fresh runs of the same name: they train on the same clients.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LEDGER
        (folder / ".noise-key").unlink(missing_ok=True)  # it took the noise off releases of version 0.1
        if self._path.is_file() and not (text := self._path.read_text()).endswith("\n"):
            self._path.write_text(text[: text.rfind("\n") + 1])  # cut off in writing: what it counts never got out
        self.read()

    def sums(self, server_round: int, release: Release) -> None:
        """Count a noisy release of a round's sums."""
        self._append({"kind": "sums", "round": server_round, **asdict(release)})

    def routes(self, server_round: int, clients: Iterable[int], epsilon: float) -> None:
        """Count that clients answer with randomised expert ids."""
        self._append({"kind": "routes", "round": server_round, "epsilon": epsilon, "clients": sorted(clients)})

    def _append(self, line: Mapping[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[list[Release], dict[int, float]]:
        """Return the releases, and by client id the epsilon that its uploaded ids add up to.

        Raises:
            FedjetsError: a line is damaged; what it counted is not known.
        """
        releases, routes = [], Counter[int]()
        for number, text in enumerate(self._path.read_text().splitlines() if self._path.is_file() else [], start=1):
            try:
                line = json.loads(text)
                if line["kind"] == "sums":
                    pools = {role: (int(line[role][0]), int(line[role][1])) for role in ("normal", "anchor")}
                    releases.append(Release(float(line["noise_multiplier"]), **pools))
                else:
                    routes.update({int(client): float(line["epsilon"]) for client in line["clients"]})
            except (ValueError, KeyError, TypeError, IndexError):
                raise FedjetsError(
                    f"{self._path}: line {number} is damaged; what this folder let out is not known: take another"
                    " run.name"
                ) from None
        return releases, dict(routes)


def spent(releases: Sequence[Release], routes: Mapping[int, float], delta: float) -> dict[str, float]:
    """Return the total epsilons of releases at ``delta``, for normal clients and for anchors.

    Args:
        releases: the noisy sums, in any order.
        routes: epsilon of the uploaded expert ids by client id.
        delta: below 1 / clients.

    Returns:
        ``releases``, how many; ``epsilon_*`` for a reader who knows the cohorts, ``epsilon_*_secret_cohorts`` for one
        who does not (equal for an anchor that joins every round), both left out where nothing had noise, since exact
        averages have no bound; ``delta``; and ``route_epsilon``, the most that any client's uploaded ids add.

    Raises:
        FedjetsError: the accountant is not installed.
    """
    told: dict[str, float] = {"releases": len(releases)}
    for role in ("normal", "anchor") if releases else ():
        events = Counter((r.noise_multiplier, *(r.normal if role == "normal" else r.anchor)) for r in releases)
        told[f"epsilon_{role}"] = _composed(events, delta, secret=False)
        # The bound with sampling is not always the smaller one.
        told[f"epsilon_{role}_secret_cohorts"] = min(told[f"epsilon_{role}"], _composed(events, delta, secret=True))
    return told | {"delta": delta, "route_epsilon": max(routes.values(), default=0.0)}


def _composed(events: Mapping[tuple[float, int, int], int], delta: float, secret: bool) -> float:
    """Return epsilon of releases (z, population, drawn) by how often each happened."""
    joined = {event: count for event, count in events.items() if event[2] > 0}
    if not joined:
        return 0.0
    check_accountant()
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    for (z, population, drawn), count in joined.items():
        gaussian = dp_accounting.GaussianDpEvent(z / 2)
        sampled = dp_accounting.SampledWithoutReplacementDpEvent(population, drawn, gaussian)
        accountant.compose(sampled if secret and drawn < population else gaussian, count)
    return float(accountant.get_epsilon(delta))


def check_accountant() -> None:
    """Raise FedjetsError if what counts epsilon is not installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise FedjetsError(
            "privacy.noise-multiplier: its accountant is missing; pip install 'fedjets-flwr[privacy]'"
        ) from None


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
