"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1): control variates against client drift.

The server keeps c and every c_i that differs from zero, so that a checkpoint holds them and no site must. Traffic is
the paper's downwards (model and correction); upwards option II needs the model alone.

The local steps may use momentum m, reset each round: after K steps on a constant gradient g the model has moved by
``lr * g * sum_{j=1..K} (1 - m^j) / (1 - m)``, and option II divides by that sum instead of K (equal for m = 0).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config, Train
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.moe.local_training import rate, steps_of
from fedjets_flwr.wire.messages import Answer, BadReply, Job
from strategies.fedavg import FedAvg


def effective_steps(steps: int, momentum: float) -> float:
    """Return how many plain SGD steps of the same rate move a model as far as ``steps`` steps with momentum."""
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def option_two(correction: Tensor, start: Tensor, end: Tensor, train: Train, lr: float, steps: int) -> Tensor:
    """Return c_i+ = c_i - c + (x - y) / (K lr), with ``correction`` = c - c_i."""
    return (start - end) / (effective_steps(steps, train.momentum) * lr) - correction


class Scaffold(FedAvg):
    """FedAvg with variance reduction; in round 1 all variates are zero and it is FedAvg."""

    local = "scaffold"
    private = False

    @classmethod
    def validate(cls, config: Config) -> None:
        """Variates are plain sums, which no robust rule protects."""
        super().validate(config)
        if config.aggregation.rule != "mean":
            raise FedjetsError(f"aggregation.rule = {config.aggregation.rule!r}: SCAFFOLD needs 'mean'")

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return the model and c = 0."""
        vectors = super().initial_vectors()
        self.exchange.sizes |= {"variate": self.expert_layout.trained, "correction": self.expert_layout.trained}
        return vectors | {"variate": torch.zeros(self.expert_layout.trained)}

    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Give every client the model and its correction c - c_i."""
        self.extra = {
            f"correction.{client}": self.vectors["variate"] - self.variate(client) for client in [*anchors, *normals]
        }
        jobs = []
        for job in super().plan(server_round, anchors, normals):
            returns = (*job.returns, *((f"variate.{job.client}",) if self.config.scaffold.option == "I" else ()))
            jobs.append(Job(job.client, (*job.vectors, f"correction.{job.client}"), returns, cost=job.cost))
        return jobs

    def merge(self, server_round: int, answers: Iterable[Answer]) -> dict[str, float]:
        """Average the models, then move the variates: c <- c + |S|/N mean_S (c_i+ - c_i)."""
        start, updates = self.vectors["expert.0"], {}
        lr = rate(self.config.train, server_round, self.config.run.rounds)

        def models() -> Iterator[Answer]:
            for answer in answers:
                name = f"variate.{answer.client}"
                if name in answer.vectors:
                    updates[name] = answer.vectors[name].clone()
                else:
                    trained = self.expert_layout.trained
                    updates[name] = option_two(
                        self.extra[f"correction.{answer.client}"],
                        start[:trained], answer.vectors["expert.0"][:trained],
                        self.config.train, lr, int(answer.number("steps")),
                    )  # fmt: skip
                yield Answer(answer.client, {"expert.0": answer.vectors["expert.0"]}, answer.numbers)

        trained = super().merge(server_round, models())
        if "expert.0" not in self.updated:
            return trained
        updates = {name: variate for name, variate in updates.items() if all_finite(variate)}
        change = torch.zeros_like(self.vectors["variate"])
        for name, variate in updates.items():
            change += variate - self.variate(int(name.removeprefix("variate.")))
        self.vectors["variate"] = self.vectors["variate"] + change / self.config.partition.clients
        self.vectors |= updates
        return trained

    def check(self, answer: Answer) -> None:
        """Also refuse a number of steps that does not fit the samples."""
        t = self.config.train
        if answer.count("steps", 10**9) != steps_of(self.samples[answer.client], t.batch_size, t.local_epochs):
            raise BadReply("steps: not the number that the client's samples make")
        bound, variate = self.config.limits.max_update_norm, answer.vectors.get(f"variate.{answer.client}")
        if bound and variate is not None and float(variate.norm()) > bound:
            raise BadReply(f"the variate is larger than limits.max-update-norm = {bound:g}")
        super().check(answer)

    def variate(self, client: int) -> Tensor:
        """Return c_i; zero for a client that never trained."""
        found = self.vectors.get(f"variate.{client}")
        return torch.zeros_like(self.vectors["variate"]) if found is None else found


METHOD = Scaffold
