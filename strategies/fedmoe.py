"""FedMoE (Mei et al. 2024, arXiv 2408.11304): a language model of which every client holds the experts that suit it.

Stage 1, once: clients that have the memory try out the whole model on their text and tell which experts it activates;
the server gives each the experts that take most of its tokens and that its memory holds. Stage 2, every round: clients
train what they hold; what all share is averaged over all of them, each expert over those that used it. Who gets no
better for a while gets as many experts as clients like it hold, on trial. An activation tells what a text is like.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Train
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec
from fedjets_flwr.models.transformer import LanguageArchitecture, members, parted, sizes_of, vector_names, whole
from fedjets_flwr.moe.lora import probe_floats
from fedjets_flwr.moe.structure import (
    Activation,
    Structure,
    count,
    experts_that_fit,
    initial_sets,
    mean_activation,
    next_structures,
    random_sets,
)
from fedjets_flwr.names import DENSE, switch_expert_name
from fedjets_flwr.seeds import numpy_generator
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from strategies.base import TEXT, Routes, Strategy

FLOAT_BYTES = 4
FLOATS_OF_ADAM = 4
"""Of a weight: itself, its gradient, two moments. Whatever trains, Adam finds out which experts a text activates."""
MOST_TOKENS = 2**53


def floats_of_a_weight(train: Train) -> int:
    """Return what training keeps of each weight: itself, its gradient, and the optimizer's moments."""
    return FLOATS_OF_ADAM if train.optimizer == "adam" else 2 + int(train.momentum > 0)


class FedMoE(Strategy):
    """One model of experts, of which clients hold different parts.

    Attributes:
        structures: which experts each training client holds, by client id.
        domains: of the clients' texts, as positions in the task's kinds, as far as they told.
    """

    algorithm = "fedmoe"
    learns: ClassVar[tuple[str, ...]] = (TEXT,)
    init = "common"
    private = False

    def __init__(self, config: Config, common: CommonExpert, task: Task) -> None:
        super().__init__(config, common, task)
        if config.run.rounds == 0 and self.probe != "none":
            raise FedjetsError(
                f"run.rounds = 0: with fedmoe.probe = {self.probe!r} clients learn in a round which experts they hold;"
                " raise it, or set fedmoe.probe to 'none'"
            )
        self.structures: dict[int, Structure] = {}
        self.domains: dict[int, int] = {}
        self._reports: dict[int, tuple[float, Activation]] = {}
        for client in range(config.partition.clients):
            self._check_memory(client)
            if self.probe == "none":
                self.structures[client] = self._drawn(client)

    # What there is ---------------------------------------------------------------------------------------------------

    @property
    def probe(self) -> str:
        """How clients find out which experts they need; ``none``: those are drawn."""
        return self.config.fedmoe.probe

    @property
    def recommends(self) -> bool:
        """Whether clients tell what they activate, and their experts change."""
        return self.config.fedmoe.recommend

    @cached_property
    def whole(self) -> LanguageArchitecture:
        """The model with all its experts."""
        architecture = self.architecture(0)
        assert isinstance(architecture, LanguageArchitecture)
        return architecture

    @property
    def vectors_moved(self) -> int:
        """What all share, and every expert."""
        return len(self.expert_names)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of all vectors of the model."""
        return vector_names(whole(self.whole))

    def state(self) -> dict[str, Tensor]:
        """Return the language model that the run starts from, in parts."""
        parts = parted(FlatModel(self.build(0)).vector, self.whole)
        return {name: part.clone() for name, part in parts.items()}

    @cached_property
    def specs(self) -> Mapping[str, VectorSpec]:
        """Layouts of the whole model, which clients must agree in, and of its parts."""
        sizes = sizes_of(self.whole)
        parts = {name: VectorSpec.plain(sizes.dense if name == DENSE else sizes.expert) for name in self.expert_names}
        return {**super().specs, **parts}

    @property
    def trained_parameters(self) -> int:
        """Weights that a client holds, on average."""
        held, sizes = sum(count(structure.held) for structure in self.structures.values()), sizes_of(self.whole)
        return sizes.dense + round(held * sizes.expert / max(1, len(self.structures)))

    # Memory ----------------------------------------------------------------------------------------------------------

    def bytes_of(self, experts: int) -> int:
        """Return the memory, in bytes, that training takes of a client with so many experts."""
        return FLOAT_BYTES * floats_of_a_weight(self.config.train) * sizes_of(self.whole).of(experts)

    def memory(self, client: int) -> float:
        """Return M_k, the bytes that a client has for training."""
        shares, experts = self.config.memory_shares, self.whole.switch_layers * self.whole.experts
        share = shares[client % len(shares)]
        return self.bytes_of(0) + share * (self.bytes_of(experts) - self.bytes_of(0))

    def fitting(self, memory: float) -> int:
        """Return how many experts fit in a memory."""
        fit = experts_that_fit(memory, self.bytes_of(0), self.bytes_of(1) - self.bytes_of(0))
        return min(fit, self.whole.switch_layers * self.whole.experts)

    def first(self, client: int) -> int:
        """Return how many experts a client may hold at first."""
        return self.fitting(self.config.fedmoe.budget * self.memory(client))

    @property
    def probe_bytes(self) -> int:
        """The memory that finding out takes: all of a trained model, or the weights and trained adapters."""
        a, experts = self.whole, self.whole.switch_layers * self.whole.experts
        if self.probe == "full":
            return FLOAT_BYTES * FLOATS_OF_ADAM * sizes_of(a).of(experts)
        adapters = probe_floats(a.width, a.hidden, experts, self.config.fedmoe.rank)
        return FLOAT_BYTES * (sizes_of(a).of(experts) + FLOATS_OF_ADAM * adapters)

    def _check_memory(self, client: int) -> None:
        if self.first(client) < self.whole.switch_layers:
            raise FedjetsError(
                f"fedmoe.memory = {self.config.fedmoe.memory!r}: client {client} may use"
                f" {self.config.fedmoe.budget * self.memory(client):.0f} bytes at first, and an expert in each layer"
                f" takes {self.bytes_of(self.whole.switch_layers)}; raise it, or fedmoe.budget"
            )

    def _drawn(self, client: int) -> Structure:
        generator = numpy_generator(self.config.run.seed, "fedmoe sets", client)
        sets = random_sets(self.whole.switch_layers, self.whole.experts, self.first(client), generator)
        return Structure(sets, self.fitting(self.memory(client)))

    # Stage 1 ---------------------------------------------------------------------------------------------------------

    def questions(self, cohort: Cohort) -> Sequence[Job]:
        """Ask every client once; who did not answer is asked again when it is drawn."""
        training = range(self.config.partition.clients)
        present = [c for c in training if c in self.num_samples and c not in self.opted_out]
        asked = [c for c in present if c not in self.structures and (not self.structures or c in cohort.clients)]
        able = {c for c in asked if self.memory(c) >= self.probe_bytes}
        return [Job(c, self.expert_names if c in able else (), cost=self.num_samples[c]) for c in asked]

    def check_answer(self, reply: Reply) -> None:
        """Refuse a domain that there is not, and shares of tokens that are none."""
        reply.count("domain", len(self.task.spec.kinds) - 1)
        if "activation" in reply.numbers or self.memory(reply.client) >= self.probe_bytes:
            self._activation(reply, whole(self.whole))

    def learn(self, replies: Sequence[Reply]) -> None:
        """Give clients their first experts; one without the memory to find out is taken to be like its domain."""
        self.domains |= {reply.client: reply.count("domain", len(self.task.spec.kinds) - 1) for reply in replies}
        told = {r.client: self._activation(r, whole(self.whole)) for r in replies if "activation" in r.numbers}
        known = {c: s.activation for c, s in self.structures.items() if s.activation is not None} | told
        if replies and not known:
            raise FedjetsError(
                f"fedmoe.memory = {self.config.fedmoe.memory!r}: no client has the {self.probe_bytes} bytes that"
                f" fedmoe.probe = {self.probe!r} takes; raise it, or set fedmoe.probe to 'none'"
            )
        for reply in replies:
            client = reply.client
            activation = told[client] if client in told else self._like_its_domain(client, known)
            sets = initial_sets(activation, self.first(client))
            self.structures[client] = Structure(sets, self.fitting(self.memory(client)), activation)

    def _like_its_domain(self, client: int, known: Mapping[int, Activation]) -> Activation:
        """Return the mean activation of the clients of a client's domain, or of all where there is none."""
        alike = [c for c in known if self.domains.get(c) == self.domains[client]] or list(known)
        # Of one that told its activation before a resume and is not here now nobody knows how much it has.
        return mean_activation([known[c] for c in alike], [self.num_samples.get(c, 1) for c in alike])

    # Stage 2 ---------------------------------------------------------------------------------------------------------

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client of the cohort what all share and the experts that it holds."""
        asked = {"activation": int(self.recommends), "used": int(self.config.fedmoe.counts == "activated")}
        names = {c: vector_names(self.structures[c].held) for c in cohort.clients if c in self.structures}
        return [Job(c, held, held, asked, self.num_samples[c]) for c, held in names.items()]

    def check(self, reply: Reply) -> None:
        """Also refuse shares and counts of tokens that cannot be, and a score that is none."""
        held = self.structures[reply.client].held
        if self.recommends:
            self._activation(reply, held)
            if reply.number("score") < 0:
                raise BadReply("score: below 0")
        if self.config.fedmoe.counts == "activated":
            self._used(reply)
        super().check(reply)

    def averaged(self, reply: Reply) -> Mapping[str, Tensor]:
        """Return what all share, and the experts that count as used."""
        if self.config.fedmoe.counts == "held":
            return reply.vectors
        used = {switch_expert_name(*at) for at in self._used(reply)}
        return {name: vector for name, vector in reply.vectors.items() if name == DENSE or name in used}

    def kept(self, server_round: int, reply: Reply) -> Mapping[str, Tensor]:
        """Return a client's score and activation, as one tensor."""
        if not self.recommends:
            return {}
        table = self._activation(reply, self.structures[reply.client].held)
        flat = [reply.number("score"), *(share for row in table for share in row)]
        return {f"report.{reply.client}": torch.tensor(flat, dtype=torch.float64)}

    def merge(self, averages: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Take the averages; an expert that nobody used stays as it was."""
        super().merge(averages, {})
        for name, told in kept.items():
            score, *shares = told.tolist()
            self._reports[int(name.removeprefix("report."))] = score, self._rows(shares)

    def after_merge(self, server_round: int) -> Mapping[str, float]:
        """Change the experts of clients that stand still; return how many clients hold, and the memory it takes."""
        how, reports, self._reports = self.config.fedmoe, self._reports, {}
        self.structures = next_structures(self.structures, reports, how.patience, how.neighbours, self.recommends)
        held = [count(structure.held) for structure in self.structures.values()]
        if not held:
            return {}
        return {
            "experts_min": min(held),
            "experts_mean": sum(held) / len(held),
            "experts_max": max(held),
            "memory_mean": sum(map(self.bytes_of, held)) / len(held),
            "memory_max": self.bytes_of(max(held)),
            "on_trial": sum(structure.before is not None for structure in self.structures.values()),
            "fixed": sum(structure.fixed for structure in self.structures.values()),
        }

    def _rows(self, shares: Sequence[float]) -> Activation:
        width = self.whole.experts
        return tuple(tuple(shares[start : start + width]) for start in range(0, len(shares), width))

    def _activation(self, reply: Reply, held: Sequence[Sequence[int]]) -> Activation:
        """Return the shares of tokens by expert that a client tells, (L, E).

        Raises:
            BadReply: they are no shares, or not of the experts that it holds.
        """
        value, size = reply.numbers.get("activation"), self.whole.switch_layers * self.whole.experts
        if not isinstance(value, list) or len(value) != size or not all(0 <= share <= 1 for share in value):
            raise BadReply(f"activation: expected {size} numbers from 0 to 1")
        table = self._rows([float(share) for share in value])
        for row, ids in zip(table, held, strict=True):
            if abs(sum(row) - 1) > 1e-6 or any(share for m, share in enumerate(row) if m not in ids):
                raise BadReply("activation: not shares of the experts that the client holds")
        return table

    def _used(self, reply: Reply) -> list[tuple[int, int]]:
        """Return (layer, expert) of the experts to which tokens went in training.

        Raises:
            BadReply: the counts are not of the experts that the client holds.
        """
        width, held = self.whole.experts, set(members(self.structures[reply.client].held))
        counts = reply.integers("used", self.whole.switch_layers * width, MOST_TOKENS)
        used = [divmod(place, width) for place, tokens in enumerate(counts) if tokens]
        if not held.issuperset(used):
            raise BadReply("used: tokens of an expert that the client does not hold")
        return used

    # Before and after ------------------------------------------------------------------------------------------------

    def notes(self) -> dict[str, Any]:
        """Return every client's structure and domain."""
        structures = {str(client): structure.to_json() for client, structure in self.structures.items()}
        return {"structures": structures, "domains": {str(client): at for client, at in self.domains.items()}}

    def recall(self, notes: Mapping[str, Any]) -> None:
        """Take them back."""
        self.structures = {int(c): Structure.from_json(told) for c, told in notes["structures"].items()}
        self.domains = {int(client): int(at) for client, at in notes["domains"].items()}
        self._reports = {}

    def results(self) -> dict[str, Any]:
        """Return the experts that each client holds at last, its memory, and what it told of its text."""
        held = {client: [list(ids) for ids in structure.held] for client, structure in self.structures.items()}
        told = {c: s.activation for c, s in self.structures.items() if s.activation is not None}
        memory = {client: self.memory(client) for client in held}
        return {"experts_held": held, "memory": memory, "activation": told, "domain_of": dict(self.domains)}

    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return what each client that takes part holds."""
        return {c: vector_names(self.structures[c].held) for c in clients if c in self.structures}


STRATEGY = FedMoE
