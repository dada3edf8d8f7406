"""The contract of a federated method: what it decides, and nothing else; the rounds are ``server_app.rounds``.

A method's state is a table of flat vectors by full name, ``expert.0`` .. ``expert.{M-1}`` and whatever else it trains.
It says how the state starts, who trains what, how replies become the next state, and what an unseen client is served.
No method here sends, waits, writes or logs; only :meth:`learn`, :meth:`merge`, :meth:`after_merge` and :meth:`recall`
change anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort, draw_cohort
from fedjets_flwr.federation.privacy import check_private
from fedjets_flwr.federation.reply_checks import check_trained
from fedjets_flwr.models.architectures import AnyArchitecture
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.expert import build_expert, builds_own_experts, expert_architecture, expert_specs
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec
from fedjets_flwr.names import expert_name
from fedjets_flwr.runs.score import UNSEEN_ACCURACY, Score
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.wire.messages import Job, Reply

Routes = Mapping[int, tuple[int, ...]]
"""The K experts that the gate chose for a client, best first, by client id; who failed to answer is not there."""


IMAGES, TEXT = "images", "text"


class Strategy(ABC):
    """A federated method, as the server knows it.

    Attributes:
        algorithm: the clients' half, a module of ``client_app.algorithms``.
        read_out: how an unseen client answers with its experts (a key of ``gating.READ_OUTS``).
        sampling: how a cohort is drawn unless ``cohort.sampling`` says otherwise.
        init: how experts start, ``random`` or ``common``; empty: as ``moe.init`` says.
        routed: whether the gate picks ``moe.top-k`` experts for an unseen client; otherwise it is served all.
        private: whether clipping and noise on the averages protect all that the method keeps.
        serves_unseen: whether a client that never trained can be served.
        keeps_state: whether clients keep tensors of their own between rounds, on their own disks.
        equal_weights: whether averages are plain means, whatever ``aggregation.weighting`` says.
        stops_early: whether the run may end before its last round (``early-stopping.*``).
        score: what the method is judged by.
        tells: numbers from 0 to 1 that clients tell of their own models, whose means the record has.
        learns: what samples may be, of ``IMAGES`` and ``TEXT``.
        vectors: the state, float32; the rounds set it at the start and on resume.
        num_samples: of each client that could be prepared, by client id.
        weights: the same as they count in averages: no training client's is far above the others' median.
        anchors: client ids of the anchors; the m-th is bound to expert m.
        opted_out: training clients that take no part in rounds; they may still ask for their own predictions.
    """

    algorithm: ClassVar[str]
    read_out: ClassVar[str] = "top-1"
    sampling: ClassVar[str] = "uniform"
    init: ClassVar[str] = ""
    routed: ClassVar[bool] = False
    private: ClassVar[bool] = True
    serves_unseen: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = False
    equal_weights: ClassVar[bool] = False
    stops_early: ClassVar[bool] = False
    score: ClassVar[Score] = UNSEEN_ACCURACY
    tells: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[tuple[str, ...]] = (IMAGES,)

    def __init__(self, config: Config, common: CommonExpert, task: Task) -> None:
        self.config, self.common, self.task = config, common, task
        self.vectors: dict[str, Tensor] = {}
        self.num_samples: dict[int, int] = {}
        self.weights: dict[int, float] = {}
        self.anchors: tuple[int, ...] = ()
        self.opted_out: frozenset[int] = frozenset()

    # What there is ---------------------------------------------------------------------------------------------------

    @classmethod
    def validate(cls, config: Config) -> None:
        """Raise FedjetsError if the settings make no sense for this method."""
        if (TEXT if config.of_text else IMAGES) not in cls.learns:
            raise FedjetsError(
                f"data.name = {config.data.name!r}: strategy.name = {config.strategy.name!r} learns"
                f" {' and '.join(cls.learns)}; choose other data, or another method"
            )
        if config.privacy.noise_multiplier > 0:
            own = builds_own_experts(config, cls.init or config.moe.init)
            by_settings = not config.of_text and (own or not config.common_expert.path)
            check_private(config, cls.private, by_settings)
        if config.personalize.read_out == "familiar":
            cls._check_familiar(config)
        if config.privacy.route_epsilon and not cls.routed:
            raise FedjetsError(
                f"privacy.route-epsilon = {config.privacy.route_epsilon:g}: clients of strategy.name ="
                f" {config.strategy.name!r} tell no route that it could protect; set it to 0"
            )
        if config.early_stopping.check_every and not cls.stops_early:
            raise FedjetsError(
                f"early-stopping.check-every = {config.early_stopping.check_every}: strategy.name ="
                f" {config.strategy.name!r} ends with its last round; set it to 0"
            )

    @classmethod
    def _check_familiar(cls, config: Config) -> None:
        """Raise FedjetsError if unseen clients cannot compare experts with what anchors tell of them."""
        rules = [
            (
                cls.routed and cls.leads(config),
                "compares a gate's choice with what its anchor tells; set strategy.name to 'fedjets', cohort.sampling"
                " to 'anchored' and cohort.anchors to 1 or more",
            ),
            (config.partition.test_share == 0, "is for clients that never train; set partition.test-share to 0"),
            (
                config.privacy.noise_multiplier == 0 and config.privacy.route_epsilon == 0,
                "anchors tell without noise how sure their experts are, and clients what they keep; set"
                " privacy.noise-multiplier and privacy.route-epsilon to 0",
            ),
        ]
        for holds, why in rules:
            if not holds:
                raise FedjetsError(f"personalize.read-out = 'familiar': {why}, or choose another read-out")

    @classmethod
    def leads(cls, config: Config) -> bool:
        """Return whether some anchors are drawn beside the normal clients, each bound to an expert."""
        return (config.cohort.sampling or cls.sampling) == "anchored" and config.cohort.anchors > 0

    @property
    def num_experts(self) -> int:
        """Number of models that the server keeps."""
        return 1

    @property
    def experts_served(self) -> int:
        """Experts that an unseen client receives."""
        return self.num_experts

    @property
    def vectors_moved(self) -> int:
        """Vectors that one client can change in a round at most: the sensitivity of private sums."""
        return self.num_experts

    @classmethod
    def holders(cls, config: Config) -> float:
        """How many clients of a round train an expert, on average, as far as the settings say: here all."""
        return config.cohort_size

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Full names of all experts."""
        return tuple(expert_name(m) for m in range(self.num_experts))

    def architecture(self, expert: int) -> AnyArchitecture:
        """Return the architecture of an expert, or of the model whose tail it is; experts may differ in it."""
        return expert_architecture(self.config, self.common, self.task.spec, self.init or self.config.moe.init)

    @property
    def architectures(self) -> list[AnyArchitecture]:
        """Architectures of all experts."""
        return [self.architecture(m) for m in range(self.num_experts)]

    def build(self, expert: int) -> nn.Sequential:
        """Return an expert at its start."""
        init = self.init or self.config.moe.init
        return build_expert(self.config, self.common, self.architecture(expert), expert, init)

    def state(self) -> dict[str, Tensor]:
        """Return the state before round 1."""
        return {expert_name(m): FlatModel(self.build(m)).vector for m in range(self.num_experts)}

    @cached_property
    def specs(self) -> Mapping[str, VectorSpec]:
        """Layouts of the state's models, by full name."""
        specs = expert_specs(self.architectures, self.config.moe.trainable)
        return {expert_name(m): spec for m, spec in enumerate(specs)}

    @cached_property
    def variances(self) -> Mapping[str, Tensor]:
        """Positions of the running variances in each vector that has some."""
        found = {name: spec.positions("running_var") for name, spec in self.specs.items()}
        return {name: places for name, places in found.items() if len(places)}

    def spec_of(self, name: str) -> VectorSpec:
        """Return the layout of any vector that travels."""
        return self.specs[name]

    # A round ---------------------------------------------------------------------------------------------------------

    def cohort(self, server_round: int) -> Cohort:
        """Return who takes part in a round.

        With noise who opts out on the way is drawn nevertheless, and not asked: the others' chance stays as it is told.
        """
        without = self.opted_out if self.config.privacy.noise_multiplier == 0 else frozenset()
        return draw_cohort(self.config, server_round, self.drawn, self.anchors, without=without)

    def to_route(self, cohort: Cohort) -> Sequence[int]:
        """Return the clients of a cohort for which the gate chooses experts before they train."""
        return ()

    def open_job(self, client: int) -> Job | None:
        """Return what a client that :meth:`to_route` names trains if it chooses its experts itself, or None.

        The job names all experts, of one size, and returns what is chosen under the names of ``names.choice_name``.
        """
        return None

    @abstractmethod
    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Return who trains what; the cohort holds the clients that are prepared."""

    def questions(self, cohort: Cohort) -> Sequence[Job]:
        """Return what clients, of the cohort or others, are asked before a round is planned (``query`` of theirs)."""
        return ()

    def check_answer(self, reply: Reply) -> None:
        """Raise BadReply if an answer to a question must not be used."""
        raise NotImplementedError

    def learn(self, replies: Sequence[Reply]) -> None:
        """Take what clients answered."""
        raise NotImplementedError

    def outgoing(self, jobs: Sequence[Job]) -> Mapping[str, Tensor]:
        """Return the vectors that jobs may name."""
        return self.vectors

    def check(self, reply: Reply) -> None:
        """Raise BadReply if a reply to a train message must not be used."""
        check_trained(reply, self.num_samples[reply.client], self.vectors, self.variances, self.config.limits)

    def averaged(self, reply: Reply) -> Mapping[str, Tensor]:
        """Return the vectors of a usable reply that go into the averages."""
        return reply.vectors

    def weight_of(self, name: str, reply: Reply) -> float:
        """Return the weight of one vector of a reply in its average."""
        by_samples = self.config.aggregation.weighting == "samples" and not self.equal_weights
        return self.weights[reply.client] if by_samples else 1.0

    def kept(self, server_round: int, reply: Reply) -> Mapping[str, Tensor]:
        """Return what the state takes from a usable reply as it is; the reply's own vectors do not outlive it."""
        return {}

    def merge(self, averages: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        """Make the next state; a vector that is not among the averages stays as it was."""
        self.vectors |= averages

    def after_merge(self, server_round: int) -> Mapping[str, float]:
        """Do what the server does by itself after a round (train a model of its own, distil); return its metrics."""
        return {}

    @property
    def done(self) -> bool:
        """Whether the round that was merged is the last, whatever ``run.rounds`` says."""
        return False

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the method besides its vectors, as JSON has it."""
        return {}

    def recall(self, notes: Mapping[str, Any]) -> None:
        """Be as the method was when it wrote down some notes."""
        assert not notes

    def results(self) -> dict[str, Any]:
        """Return what ``summary.json`` says of the method besides what it says of all."""
        return {}

    @property
    def trained_parameters(self) -> int:
        """Weights that a client's predictions take."""
        gate = self.specs["gate"].size if "gate" in self.specs else 0
        return self.experts_served * self.specs["expert.0"].trained + gate

    # Predictions ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def serve(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return the vectors that each unseen client receives for its predictions."""

    def personal(self, clients: Sequence[int], routes: Routes) -> dict[int, tuple[str, ...]]:
        """Return the vectors that clients which train receive for their own predictions; they may adapt them first."""
        return self.serve(clients, routes)

    @property
    def drawn(self) -> str:
        """How cohorts are drawn."""
        return self.config.cohort.sampling or self.sampling

    @property
    def vouched(self) -> bool:
        """Whether anchors tell how sure their experts are, for clients that compare themselves with them."""
        return self.config.personalize.read_out == "familiar"

    @property
    def reading(self) -> str:
        """What counts as the method's accuracy: read-out, prior correction, statistics (one of ``READINGS``)."""
        how = self.config.personalize
        return f"{how.read_out or self.read_out}/{how.prior}{'/adabn' if how.statistics == 'own' else ''}"


class OfExperts(Strategy):
    """A method of ``moe.experts`` models, to each of which an anchor client may be bound."""

    @classmethod
    def validate(cls, config: Config) -> None:
        """Where anchors take part as such, every one needs an expert of its own."""
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
