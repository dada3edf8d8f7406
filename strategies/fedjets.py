"""FedJETs (arXiv 2306.08586, Algorithm 1): the gate picks K of M experts for each client before it trains.

A round takes two exchanges with the normal clients: the gate goes out and the ids of the chosen experts come back; then
exactly those experts go out and come back trained. Anchors are bound to one expert and skip the first. When the unseen
clients are asked for an evaluation, the normal clients of the next round are asked along: the gate is the same.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.models.expert import build_configured_gate
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.wire.messages import BadReply, Job
from strategies.base import Method


class FedJets(Method):
    """Gate-driven expert dispatch with per-expert averaging."""

    local = "fedjets"
    _ahead: Mapping[int, tuple[int, ...]] = {}
    read_out = "top-1"
    sampling = "anchored"
    routed = True

    @classmethod
    def validate(cls, config: Config) -> None:
        """Every anchor client needs an expert of its own."""
        super().validate(config)
        if config.num_anchors > config.moe.experts and (config.cohort.sampling or cls.sampling) == "anchored":
            raise FedjetsError(
                f"partition.anchors = {config.num_anchors}: more than moe.experts = {config.moe.experts};"
                " lower it, or set cohort.sampling to 'uniform'"
            )

    @property
    def num_experts(self) -> int:
        """M."""
        return self.config.moe.experts

    @property
    def experts_served(self) -> int:
        """K."""
        return self.config.moe.top_k

    @property
    def vectors_moved(self) -> int:
        """K experts and the gate."""
        return self.config.moe.top_k + 1

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return M experts, and a gate at its random start."""
        gate = FlatModel(build_configured_gate(self.config, self.common, self.num_experts))
        self.exchange.sizes["gate"] = gate.layout.size
        return super().initial_vectors() | {"gate": gate.vector}

    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Give anchors their expert and normal clients the K that the gate chooses."""
        trained = ("gate",) if self.config.gate.mode == "learned" else ()
        chosen: dict[int, tuple[int, ...]] = {client: (self.anchors.index(client),) for client in anchors}
        chosen |= {client: self._ahead[client] for client in normals if client in self._ahead}
        if rest := [client for client in normals if client not in self._ahead]:
            chosen |= self.choose(server_round, rest)
        self._ahead = {}
        jobs = []
        for client, experts in chosen.items():
            names = tuple(f"expert.{m}" for m in experts)
            numbers = {"anchor": client} if client in anchors else {}
            cost = self.samples[client] * len(experts)
            jobs.append(Job(client, (*names, "gate"), (*names, *trained), numbers, cost))
        return jobs

    def choose(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Ask clients which experts the current gate picks for their data; a client that fails is left out."""
        jobs = [Job(client, ("gate",), cost=self.samples[client]) for client in clients]
        chosen = {}
        if self.config.privacy.route_epsilon > 0:
            self.ledger.routes(server_round, clients, self.config.privacy.route_epsilon)
        with self.clock("select"):
            for answer in self.exchange.ask("query.route", server_round, jobs, self.vectors):
                try:
                    experts = answer.integers("experts", self.config.moe.top_k)
                    if len(set(experts)) != len(experts) or not all(0 <= m < self.num_experts for m in experts):
                        raise BadReply(f"experts {experts}: not {self.config.moe.top_k} different ids of experts")
                except BadReply as error:
                    self.exchange.reject(answer.client, str(error))
                    continue
                chosen[answer.client] = tuple(experts)
        self.note_failures()
        return chosen

    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return the K experts of each unseen client, and the gate that picks among them for each sample."""
        coming: list[int] = []
        if server_round < self.config.run.rounds:
            drawn = draw_cohort(self.config, server_round + 1, self.drawn, self.anchors)[1]
            coming = [client for client in drawn if client in self.samples]
        chosen = self.choose(server_round, [*clients, *coming])
        self._ahead = {client: chosen.pop(client) for client in coming if client in chosen}
        return {client: (*(f"expert.{m}" for m in experts), "gate") for client, experts in chosen.items()}


METHOD = FedJets
