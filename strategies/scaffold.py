"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1): control variates against client drift.

The server keeps c and every c_i that differs from zero, so that a checkpoint holds them and no site must. Traffic is
the paper's downwards (model and correction); upwards option II needs the model alone.

The local steps may use momentum m, reset each round: after K steps on a constant gradient g the model has moved by
``lr * g * sum_{j=1..K} (1 - m^j) / (1 - m)``, and option II divides by that sum instead of K (equal for m = 0).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Train
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.moe.local_training import rate, round_steps
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies.base import Routes
from strategies.fedavg import FedAvg


def effective_steps(steps: int, momentum: float) -> float:
    """Return how many plain SGD steps of the same rate move a model as far as ``steps`` steps with momentum."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def option_two(correction: Tensor, start: Tensor, end: Tensor, train: Train, lr: float, steps: int) -> Tensor:
    """Return c_i+ = c_i - c + (x - y) / (K lr), with ``correction`` = c - c_i."""
    return (start - end) / (effective_steps(steps, train.momentum) * lr) - correction


class Scaffold(FedAvg):
    """FedAvg with variance reduction; in round 1 all variates are zero and it is FedAvg."""

    algorithm = "scaffold"
    private = False
    equal_weights = True  # Algorithm 1: plain means of models and of variates, whose sum of c - c_i is zero
    stops_early = False  # its variates are of the last model

    @classmethod
    def validate(cls, config: Config) -> None:
        """Variates are plain sums, which no robust rule protects."""
        super().validate(config)
        if config.aggregation.rule != "mean":
            raise FedjetsError(f"aggregation.rule = {config.aggregation.rule!r}: SCAFFOLD needs 'mean'")
        if config.train.optimizer != "sgd":
            raise FedjetsError(f"train.optimizer = {config.train.optimizer!r}: SCAFFOLD corrects steps of 'sgd'")

    def state(self) -> dict[str, Tensor]:
        """Return the model and c = 0."""
        return super().state() | {"variate": torch.zeros(self._trained)}

    @property
    def _trained(self) -> int:
        """Length of a variate: the model without batch norm's statistics."""
        return self.specs["expert.0"].trained

    def spec_of(self, name: str) -> VectorSpec:
        """Return the layout of the model, or of a variate or correction."""
        return super().spec_of(name) if name in self.specs else VectorSpec.plain(self._trained)

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client the model and its correction c - c_i."""
        own = self.config.scaffold.option == "I"
        return [
            replace(job, vectors=(*job.vectors, f"correction.{job.client}"),
                    returns=(*job.returns, *((f"variate.{job.client}",) if own else ())))
            for job in super().plan(cohort, routes)
        ]  # fmt: skip

    def outgoing(self, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        """Return the state, and the correction of each client that trains."""
        training = [job.client for job in jobs if f"correction.{job.client}" in job.vectors]
        return self.vectors | {f"correction.{client}": self._correction(client) for client in training}

    def averaged(self, reply: Reply) -> Mapping[str, Tensor]:
        """Return the model."""
        return {"expert.0": reply.vectors["expert.0"]}

    def kept(self, server_round: int, reply: Reply) -> Mapping[str, Tensor]:
        """Return the client's next variate c_i+."""
        name = f"variate.{reply.client}"
        if self.config.scaffold.option == "I":
            return {name: reply.vectors[name].clone()}
        start, end = (vectors["expert.0"][: self._trained] for vectors in (self.vectors, reply.vectors))
        lr = rate(self.config.train, server_round, self.config.run.rounds)
        steps = int(reply.number("steps"))
        return {name: option_two(self._correction(reply.client), start, end, self.config.train, lr, steps)}

    def merge(self, averages: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Average the models, then move the variates: c <- c + |S|/N mean_S (c_i+ - c_i)."""
        super().merge(averages, kept)
        if "expert.0" not in averages:
            return
        updates = {name: variate for name, variate in kept.items() if all_finite(variate)}
        change = torch.zeros_like(self.vectors["variate"])
        for name, variate in updates.items():
            change += variate - self.variate(int(name.removeprefix("variate.")))
        moved = self.vectors["variate"] + change / (self.config.partition.clients - len(self.opted_out))
        if all_finite(moved):  # finite variates can still overflow together
            self.vectors |= updates | {"variate": moved}

    def check(self, reply: Reply) -> None:
        """Also refuse a number of steps that does not fit the samples."""
        if reply.count("steps", 10**9) != round_steps(self.config.train, self.num_samples[reply.client]):
            raise BadReply("steps: not the number that the client's samples make")
        bound, variate = self.config.limits.max_update_norm, reply.vectors.get(f"variate.{reply.client}")
        if bound and variate is not None and float(variate.norm()) > bound:
            raise BadReply(f"the variate is larger than limits.max-update-norm = {bound:g}")
        super().check(reply)

    def variate(self, client: int) -> Tensor:
        """Return c_i; zero for a client that never trained."""
        found = self.vectors.get(f"variate.{client}")
        return torch.zeros_like(self.vectors["variate"]) if found is None else found

    def _correction(self, client: int) -> Tensor:
        return self.vectors["variate"] - self.variate(client)


STRATEGY = Scaffold
