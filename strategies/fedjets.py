"""FedJETs (arXiv 2306.08586, Algorithm 1): the gate picks K of M experts for each client before it trains.

A round takes two exchanges with the normal clients: the gate goes out and the ids of the chosen experts come back; then
exactly those experts go out and come back trained. Anchors are bound to one expert and skip the first. In a simulation
clients read the server's memory; where experts are small, both are one: the client chooses, and reads what it chose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.expert import build_configured_gate
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec
from fedjets_flwr.names import choice_name, expert_name, is_choice
from fedjets_flwr.wire.messages import Job
from strategies.base import OfExperts, Routes


class FedJets(OfExperts):
    """Gate-driven expert dispatch with per-expert averaging."""

    algorithm = "fedjets"
    read_out = "top-1"
    sampling = "anchored"
    routed = True

    @classmethod
    def validate(cls, config: Config) -> None:
        """A gate that learns from anchors needs some that take part as such."""
        super().validate(config)
        if config.gate.learns_from == "anchors" and not cls.leads(config):
            raise FedjetsError(
                "gate.learns-from = 'anchors': no anchor takes part; set cohort.sampling to 'anchored' and"
                " cohort.anchors to 1 or more, or gate.learns-from to 'all'"
            )
        if config.gate.mode == "oracle" and config.cohort.anchor_selection != "partition":
            raise FedjetsError(
                "gate.mode = 'oracle': it knows what the partition's anchors hold, and others are chosen; set"
                " cohort.anchor-selection to 'partition'"
            )
        if config.gate.mode == "oracle" and config.num_anchors > config.moe.experts:
            raise FedjetsError(
                f"gate.mode = 'oracle': {config.num_anchors} anchors are not one for each of {config.moe.experts}"
                " experts; set partition.anchors to 0"
            )

    @property
    def experts_served(self) -> int:
        """K."""
        return self.config.moe.top_k

    @property
    def vectors_moved(self) -> int:
        """K experts and the gate."""
        return self.config.moe.top_k + 1

    @classmethod
    def holders(cls, config: Config) -> float:
        """Of M experts an anchor trains one, and every other client K."""
        anchors = config.cohort.anchors if cls.leads(config) else 0
        return (anchors + (config.cohort_size - anchors) * config.moe.top_k) / config.moe.experts

    def state(self) -> dict[str, Tensor]:
        """Return M experts, and a gate at its random start."""
        return super().state() | {"gate": self._gate().vector}

    @cached_property
    def specs(self) -> Mapping[str, VectorSpec]:
        """Layouts of the experts and the gate."""
        return {**super().specs, "gate": self._gate().spec}

    def _gate(self) -> FlatModel:
        return FlatModel(build_configured_gate(self.config, self.common, self.num_experts))

    def to_route(self, cohort: Cohort) -> Sequence[int]:
        """Return the normal clients."""
        return cohort.normals

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give anchors their expert and normal clients the K that the gate chose; one without a choice is left out."""
        bound = {client: (self.anchors.index(client),) for client in cohort.anchors}
        jobs = []
        for client, experts in (bound | {c: routes[c] for c in cohort.normals if c in routes}).items():
            names = tuple(expert_name(m) for m in experts)
            numbers = {"anchor": client} if client in bound else {}
            trained = ("gate",) if self.config.gate.trained_by(client in bound) else ()
            cost = self.num_samples[client] * len(experts)
            jobs.append(Job(client, (*names, "gate"), (*names, *trained), numbers, cost))
        return jobs

    def open_job(self, client: int) -> Job | None:
        """Give a normal client all experts to choose K from; None where they differ in size."""
        if len({self.specs[name].size for name in self.expert_names}) > 1:
            return None
        count = self.config.moe.top_k
        (routed,) = self.plan(Cohort((), (client,), 0), {client: tuple(range(count))})
        slots = {expert_name(m): choice_name(m) for m in range(count)}
        ready = (*self.expert_names, *(name for name in routed.vectors if name not in slots))
        returns = tuple(slots.get(name, name) for name in routed.returns)
        return replace(routed, vectors=ready, returns=returns, numbers={**routed.numbers, "choose": count})

    def spec_of(self, name: str) -> VectorSpec:
        """Return the layout of any vector that travels; experts that clients choose from are alike."""
        return super().spec_of(expert_name(0) if is_choice(name) else name)

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return the K experts of each unseen client, and the gate that picks among them for each sample."""
        return {c: (*(expert_name(m) for m in routes[c]), "gate") for c in clients if c in routes}


STRATEGY = FedJets
