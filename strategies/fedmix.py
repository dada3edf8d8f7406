"""FedMix-style mixture (Reisser et al. 2021, as FedJETs describes its baseline): all M experts go to every client.

A reconstruction: the method section of the original could not be read and it has no public code. Experts and a shared
gate train jointly on the mixture; an expert's average weights a client by N_s p(z|s), its stake in that expert; unseen
clients answer with the soft mixture. A gate kept at each client, as in the original, cannot serve an unseen client.
"""

from collections.abc import Sequence

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.names import expert_id
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies.base import Routes
from strategies.fedjets import FedJets


class FedMix(FedJets):
    """Every client trains every expert; with one expert it is FedAvg."""

    algorithm = "fedmix"
    read_out = "mixture"
    sampling = "uniform"
    routed = False

    @classmethod
    def validate(cls, config: Config) -> None:
        """A mixture of all experts has no use for a gate that does not learn, nor for a loss that is not its own."""
        if config.gate.mode != "learned":
            raise FedjetsError(f"gate.mode = {config.gate.mode!r}: FedMix learns its gate; set it to 'learned'")
        if config.gate.learns_from != "all":
            raise FedjetsError("gate.learns-from = 'anchors': all clients train FedMix's gate; set it to 'all'")
        if config.moe.mix == "logits":
            raise FedjetsError("moe.mix = 'logits': FedMix mixes probabilities; set it to 'probs' or leave it out")
        if config.aggregation.weighting != "samples" and config.fedmix.weighting != "samples":
            raise FedjetsError(
                f"aggregation.weighting = {config.aggregation.weighting!r}: a client's stake in an expert"
                " (fedmix.weighting = 'responsibility') grows with its samples; set fedmix.weighting to 'samples'"
            )
        super().validate(config)

    @property
    def experts_served(self) -> int:
        """All."""
        return self.num_experts

    @property
    def vectors_moved(self) -> int:
        """All experts and the gate."""
        return self.num_experts + 1

    @classmethod
    def holders(cls, config: Config) -> float:
        """All clients of a round train every expert."""
        return config.cohort_size

    @property
    def everything(self) -> tuple[str, ...]:
        """Names of all experts and the gate."""
        return (*self.expert_names, "gate")

    def to_route(self, cohort: Cohort) -> Sequence[int]:
        """Nobody: everyone trains everything."""
        return ()

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client of the cohort all experts and the gate."""
        names = self.everything
        return [Job(c, names, names, cost=self.num_samples[c] * self.num_experts) for c in cohort.clients]

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return everything for every unseen client."""
        return dict.fromkeys(clients, self.everything)

    def weight_of(self, name: str, reply: Reply) -> float:
        """Weight an expert by the client's stake in it, if ``fedmix.weighting`` says so."""
        if name == "gate" or self.config.fedmix.weighting == "samples":
            return super().weight_of(name, reply)
        mass = reply.numbers["mass"]
        assert isinstance(mass, list)
        stake, samples = float(mass[expert_id(name)]), self.num_samples[reply.client]
        return stake * (self.weights[reply.client] / samples) if stake > 1e-6 * samples else 0.0

    def check(self, reply: Reply) -> None:
        """Also refuse a mass that does not share the samples out over the experts."""
        mass, samples = reply.numbers.get("mass"), self.num_samples[reply.client]
        if not isinstance(mass, list) or len(mass) != self.num_experts or not all(0 <= m <= samples for m in mass):
            raise BadReply("mass: expected one number per expert, up to the number of samples")
        if abs(sum(mass) - samples) > 1e-3 * samples:
            raise BadReply("mass: does not add up to the number of samples")
        super().check(reply)


STRATEGY = FedMix
