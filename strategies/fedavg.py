"""FedAvg (McMahan et al. 2017): one model for everybody, started from the common expert as in FedJETs' Table 1."""

import statistics
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.federation.reply_checks import bounded_mean
from fedjets_flwr.moe.early_stopping import looks
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies.base import IMAGES, TEXT, Routes, Strategy

LOOK = "validation-loss"


class FedAvg(Strategy):
    """One global model, averaged over a cohort that is drawn uniformly from all training clients.

    With ``early-stopping.check-every`` the cohort also tells the loss of the model that it received; the run ends when
    that falls no more, with the best model (Listo Zec et al. 2020; their code keeps one client's in place of the mean).
    """

    algorithm = "fedavg"
    learns: ClassVar[tuple[str, ...]] = (IMAGES, TEXT)
    init = "common"
    stops_early = True

    @classmethod
    def validate(cls, config: Config) -> None:
        """Looking at the model needs validation parts, and tells of them more than noise on updates hides."""
        super().validate(config)
        if not (every := config.early_stopping.check_every):
            return
        if config.partition.val_share == 0 and not config.of_text:
            raise FedjetsError("early-stopping.check-every needs validation parts: set partition.val-share to 0.2, say")
        if config.privacy.noise_multiplier:
            raise FedjetsError(
                "early-stopping.check-every: privacy.noise-multiplier does not protect the losses that clients tell;"
                " set one of them to 0"
            )
        if config.run.rounds < every + 2:
            raise FedjetsError(
                f"early-stopping.check-every = {every}: the second look comes in round {every + 2}, and run.rounds ="
                f" {config.run.rounds}; raise that, or lower it"
            )

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client of the cohort the model."""
        return [Job(c, ("expert.0",), ("expert.0",), cost=self.num_samples[c]) for c in cohort.clients]

    def check(self, reply: Reply) -> None:
        """Also refuse a loss of the received model that can be none; a client may tell none."""
        super().check(reply)
        if LOOK in reply.numbers and reply.number(LOOK) < 0:
            raise BadReply(f"{LOOK}: below 0")

    def kept(self, server_round: int, reply: Reply) -> Mapping[str, Tensor]:
        """Return the loss of the model that the client received and its weight, where the round looks at it."""
        if LOOK not in reply.numbers or not looks(self.config.early_stopping, server_round):
            return {}
        return {f"look.{reply.client}": torch.tensor([reply.number(LOOK), self.weights[reply.client]])}

    def merge(self, averages: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Remember the model that was sent if it is the best so far, and take the average in its place."""
        if told := [look.tolist() for name, look in kept.items() if name.startswith("look.")]:
            losses, weights = zip(*told, strict=True)
            # A robust rule must not be outdone by what clients say of the model.
            mean = self.config.aggregation.rule == "mean"
            loss = bounded_mean(losses, weights) if mean else statistics.median(losses)
            lowest, late = self.vectors.get("looks", torch.tensor([torch.inf, 0.0])).tolist()
            if loss < lowest:
                self.vectors |= {"best": self.vectors["expert.0"].clone(), "looks": torch.tensor([loss, 0.0])}
            else:
                self.vectors["looks"] = torch.tensor([lowest, late + 1])
        super().merge(averages, kept)

    def after_merge(self, server_round: int) -> Mapping[str, float]:
        """Return the lowest loss so far; the last round ends with the model that had it."""
        if "best" not in self.vectors:
            return {}
        if self.done or server_round == self.config.run.rounds:
            self.vectors["expert.0"] = self.vectors["best"].clone()
        return {"lowest-validation-loss": float(self.vectors["looks"][0])}

    @property
    def done(self) -> bool:
        """Whether as many looks as ``early-stopping.patience`` found the model no better."""
        return "looks" in self.vectors and float(self.vectors["looks"][1]) >= self.config.early_stopping.patience

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return the model for every unseen client."""
        return dict.fromkeys(clients, ("expert.0",))


STRATEGY = FedAvg
