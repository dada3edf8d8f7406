"""IFCA (Ghosh et al. 2020, arXiv 2006.04088), the variant that averages models: clusters of clients by their losses.

Every client of a round receives all M models, trains the one that fits its samples best and returns that one alone, M
models down for one up. There is no gate: a client that never trained, and has no labels, answers with the model that is
surest of its samples (:func:`fedjets_flwr.moe.gating.surest`), which the paper leaves open.

The paper starts the models far apart, or again and again. Here they start as ``moe.init`` says; where they are equal,
as from one common expert, a client whose models fit equally well draws one. With ``cohort.sampling = "anchored"`` the
anchors train the model that they are bound to, as FedJETs' do, and the models differ from round 1 on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.names import expert_name
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies.base import OfExperts, Routes

TRAINED = "trained"
"""Name in a reply of the model that the client chose; ``cluster`` says which."""


class Ifca(OfExperts):
    """M models, each the average of the clients that chose it."""

    algorithm = "ifca"

    @property
    def vectors_moved(self) -> int:
        """The model that the client chose."""
        return 1

    @classmethod
    def holders(cls, config: Config) -> float:
        """Of M models a client trains one."""
        return config.cohort_size / config.moe.experts

    def spec_of(self, name: str) -> VectorSpec:
        """Return the layout of a model: all have the same."""
        return super().spec_of(expert_name(0) if name == TRAINED else name)

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client all models, and an anchor its own."""
        bound = {client: (expert_name(self.anchors.index(client)),) for client in cohort.anchors}
        held = {client: bound.get(client, self.expert_names) for client in cohort.clients}
        return [Job(c, names, (TRAINED,), cost=self.num_samples[c] * (2 + len(names)) / 3) for c, names in held.items()]

    def check(self, reply: Reply) -> None:
        """Also refuse a model that there is not, and one of an anchor that is not its own."""
        cluster = self._cluster(reply)
        if self.drawn == "anchored" and reply.client in self.anchors and self.anchors[cluster:][:1] != (reply.client,):
            raise BadReply(f"cluster: {cluster} is not the anchor's own")
        super().check(replace(reply, vectors=self.averaged(reply)))

    def averaged(self, reply: Reply) -> Mapping[str, Tensor]:
        """Return the model that the client trained, by its full name."""
        return {expert_name(self._cluster(reply)): reply.vectors[TRAINED]}

    def _cluster(self, reply: Reply) -> int:
        return reply.count("cluster", self.num_experts - 1)

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return all models for every unseen client."""
        return dict.fromkeys(clients, self.expert_names)


STRATEGY = Ifca
