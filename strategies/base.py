"""What every method shares: the rounds, averaging, evaluation of unseen clients, checkpoints, results.

The global state is a table of flat vectors, ``expert.0`` .. ``expert.{M-1}`` and whatever else a method trains. It
stays here, on the server, and never becomes one big ArrayRecord: a client gets exactly the vectors that its job names.
A method says who trains what (:meth:`Method.plan`), how answers are merged, and what an unseen client is served.
"""

import logging
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.datasets import Dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import Aggregator, PooledMeans, RunningMeans, all_finite, make_aggregator
from fedjets_flwr.federation.anchors import select_anchors
from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.federation.privacy import Ledger, PrivateMeans, check_noise_fits, check_private, release_of, spent
from fedjets_flwr.federation.reply_checks import check_trained, stop_if_too_many_failed
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.models.expert import build_expert, builds_own_experts, expert_input, forward_flops, gate_inputs
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.metrics import ClientResult, summarise
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.runs.tracking import Tracker, facts_of
from fedjets_flwr.seeds import derive
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import Answer, BadReply, Job
from server_app.evaluation import inspect, read_result
from server_app.preparation import prepare, prepare_all

log = logging.getLogger("flwr")


class Method(Strategy):
    """A federated method as a Flower strategy.

    Attributes:
        local: name of the clients' local algorithm (a module of ``client_app.algorithms``).
        read_out: how an unseen client answers with its experts (a key of ``gating.READ_OUTS``).
        sampling: how a cohort is drawn unless ``cohort.sampling`` says otherwise.
        init: how experts start, ``random`` or ``common``; empty: as ``moe.init`` says.
        routed: whether the gate picks ``moe.top-k`` experts for an unseen client; otherwise it is served all.
        private: whether clipping and noise on the sums protect all that the method keeps.
        vectors: the global state.
        extra: vectors of the current round that jobs may name besides the state's.
        samples: training samples or, of unseen clients, samples to classify, by client id.
        anchors: client ids of the anchors; the m-th is bound to expert m.
        unseen: clients that never train and whose labels score the method.
        unlabelled: clients that never train and have no labels; experts are chosen for them all the same.
    """

    local: ClassVar[str]
    read_out: ClassVar[str] = "top-1"
    sampling: ClassVar[str] = "uniform"
    init: ClassVar[str] = ""
    routed: ClassVar[bool] = False
    private: ClassVar[bool] = True

    def __init__(
        self, config: Config, common: CommonExpert, dataset: Dataset, tracker: Tracker, checkpoints: Checkpoints
    ) -> None:
        self.config, self.common, self.dataset = config, common, dataset
        self.tracker, self.checkpoints = tracker, checkpoints
        self.exchange: Exchange
        self.vectors: dict[str, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.samples: dict[int, int] = {}
        self.unseen: list[int] = []
        self.unlabelled: list[int] = []
        self.anchors: tuple[int, ...] = ()
        self.updated: set[str] = set()
        self._replaced: dict[str, Tensor] = {}  # the round before last: memory for the next means
        self.ledger = Ledger(config.run_dir)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.round_failures: dict[int, str] = {}
        self.cohort: tuple[list[int], list[int]] = ([], [])

    # What a method decides -------------------------------------------------------------------------------------------

    @classmethod
    def validate(cls, config: Config) -> None:
        """Raise FedjetsError if the settings make no sense for this method."""
        own_init = cls.init or config.moe.init
        if config.privacy.noise_multiplier > 0:
            check_private(config, cls.private, builds_own_experts(config, own_init) or not config.common_expert.path)

    @property
    def experts_served(self) -> int:
        """Experts that an unseen client receives."""
        return self.num_experts

    @property
    def vectors_moved(self) -> int:
        """Vectors that one client can change in a round at most."""
        return self.num_experts

    @property
    def num_experts(self) -> int:
        """Number of models that the server keeps."""
        return 1

    def initial_vectors(self) -> dict[str, Tensor]:
        """Return the state before round 1."""
        experts = [
            FlatModel(build_expert(self.config, self.common, self.dataset, m, self.init or self.config.moe.init))
            for m in range(self.num_experts)
        ]
        self.expert_layout = experts[0].layout
        if self.config.privacy.noise_multiplier > 0:
            check_noise_fits(self.config, self.expert_layout.size > self.expert_layout.trained)
        self.expert_flops = forward_flops(experts[0].module, expert_input(self.config, self.common, self.dataset))
        self.exchange.sizes["expert"] = experts[0].layout.size
        self.exchange.facts |= {"expert-init": self.init, "expert-layout": experts[0].layout.digest}
        return {f"expert.{m}": expert.vector for m, expert in enumerate(experts)}

    def draw(self, server_round: int) -> tuple[list[int], list[int]]:
        """Return the anchors and the normal clients of a round, each in ascending order; every one gets prepared."""
        return draw_cohort(self.config, server_round, self.drawn, self.anchors)

    @abstractmethod
    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Return who trains what in a round."""

    @abstractmethod
    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return the vectors that each unseen client receives for its answers."""

    def merge(self, server_round: int, answers: Iterable[Answer]) -> dict[str, float]:
        """Fold the answers of a round into the state, each vector by itself.

        Returns the sample-weighted mean of the clients' losses and the number of clients that trained each vector.

        Raises:
            FedjetsError: too many clients failed; the state is as before.
        """
        aggregator = self.aggregator(server_round)
        losses, samples_seen, answered = 0.0, 0, 0
        for answer in answers:
            samples, loss = int(answer.number("num-examples")), answer.number("loss")
            with self.clock("aggregate"):
                for name, vector in answer.vectors.items():
                    aggregator.add(name, vector, self.weight_of(name, answer, samples))
            losses += samples * loss
            samples_seen += samples
            answered += 1
        self.note_failures()
        stop_if_too_many_failed(
            server_round, [*self.cohort[0], *self.cohort[1]], self.round_failures, self.config.limits
        )
        self.updated = set()
        if answered >= self.config.limits.min_replies:
            if aggregator.counts and self.config.privacy.noise_multiplier > 0:
                self.ledger.sums(server_round, release_of(self.config, self.drawn))
            with self.clock("aggregate"):
                quorum = self.config.limits.min_replies_per_expert
                for name, vector in aggregator.result().items():
                    if not all_finite(vector):  # finite replies can still overflow together
                        log.warning("round %d: the mean of %s is not finite; it stays as it was", server_round, name)
                    elif aggregator.counts[name] >= quorum:
                        self._replaced[name] = self.vectors[name]
                        self.vectors[name] = vector
                        self.updated.add(name)
        else:
            log.warning("round %d: %d answers, fewer than limits.min-replies; weights stay", server_round, answered)
        return {"loss": losses / samples_seen if samples_seen else float("nan"), **aggregator.counts}

    def aggregator(self, server_round: int) -> Aggregator:
        """Return what combines this round's vectors: private, robust, or the running mean."""
        if self.config.privacy.noise_multiplier > 0:
            return PrivateMeans(self.vectors, self.config.privacy, self.vectors_moved)
        if self.config.aggregation.bn == "pooled":
            layouts = {name: self.expert_layout for name in self.vectors if name.startswith("expert.")}
            means, variances = (
                {name: layout.positions(leaf) for name, layout in layouts.items()}
                for leaf in ("running_mean", "running_var")
            )
            return PooledMeans(means, variances, RunningMeans(self._replaced))
        return make_aggregator(self.config.aggregation, self.vectors, self._replaced)

    def weight_of(self, name: str, answer: Answer, samples: int) -> float:
        """Return the weight of one vector of an answer in its average."""
        return samples if self.config.aggregation.weighting == "samples" else 1.0

    # Flower's hooks --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the train messages of a round."""
        self.cohort = self.draw(server_round)
        self.exchange.nodes.refresh(self.config.limits.exchange_seconds)
        late = [client for clients in self.cohort for client in clients if client not in self.samples]
        if late:
            self.samples |= prepare(self.exchange, self.config, late).samples
        anchors, normals = (self._prepared(clients) for clients in self.cohort)
        jobs = self.plan(server_round, anchors, normals)
        return self.exchange.request(f"train.{self.local}", server_round, jobs, self.vectors | self.extra)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the state, in client-id order; the state stays here, so no arrays are returned."""
        self.trained = self.merge(server_round, self._usable(self.exchange.answers(replies)))
        return None, MetricRecord(dict(self.trained))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluate messages to the unseen clients."""
        self._served = self.serve(server_round, [*self.unseen, *self.unlabelled])
        jobs = [Job(c, self._served[c], cost=self.samples[c]) for c in self.unseen if c in self._served]
        return self.exchange.request("evaluate", server_round, jobs, self.vectors)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the unseen clients' counts in :attr:`results`."""
        self.results: dict[int, ClientResult] = {}
        for answer in self.exchange.answers(replies):
            try:
                experts = _expert_ids(self._served[answer.client])
                samples, classes = self.samples[answer.client], len(self.dataset.classes)
                self.results[answer.client] = read_result(answer, experts, samples, classes)
            except BadReply as error:
                self.exchange.reject(answer.client, str(error))
        self.note_failures()
        if self.unseen and not self.results:
            raise FedjetsError(f"round {server_round}: no unseen client answered; the log above has the reasons")
        return None

    def summary(self) -> None:
        """Log what the run is."""
        c = self.config
        log.info("%s on %s, %d rounds -> %s", c.strategy.name, c.data.name, c.run.rounds, c.run_dir)

    # The rounds ------------------------------------------------------------------------------------------------------

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, **_: object
    ) -> Result:
        """Run all rounds, from the newest checkpoint if ``run.resume`` is set; results go to the run folder.

        Raises:
            FedjetsError: too many clients failed, or no node came.
        """
        c = self.config
        self.exchange = Exchange(grid, c, self.common)
        try:
            self._run(grid)
        finally:
            self.exchange.close()
        return Result()

    def _run(self, grid: Grid) -> None:
        c = self.config
        self.vectors = self.initial_vectors()
        first = self._resume() + 1
        self._prepare()
        for server_round in range(first, c.run.rounds + 1):
            before = dict(self.vectors)
            try:
                record = self._round(server_round, grid)
            except (Exception, SystemExit):  # SystemExit: Flower's way to stop a deployed ServerApp
                with suppress(FedjetsError):
                    self.checkpoints.save(server_round - 1, before, {}, last=True)
                raise
            self.tracker.log(record)
            log.info("round %d/%d: %s", server_round, c.run.rounds, facts_of([record]))
            self.checkpoints.save(server_round, self.vectors, record, server_round == c.run.rounds)

    def _round(self, server_round: int, grid: Grid) -> dict[str, object]:
        """Do one round and return its record."""
        c, arrays, settings = self.config, ArrayRecord(), ConfigRecord()
        started, before = time.monotonic(), self.exchange.traffic.copy()
        timed, self.round_failures = self.seconds.copy(), {}
        messages = self.configure_train(server_round, arrays, settings, grid)
        with self.clock("train"):
            self.aggregate_train(server_round, self.exchange.stream(messages))
        record: dict[str, object] = {"round": server_round, "loss": self.trained.pop("loss")}
        record |= {"cohort": sorted([*self.cohort[0], *self.cohort[1]]), "trained": self.trained}
        last = server_round == c.run.rounds
        if last or server_round % c.run.evaluate_every == 0:
            messages = self.configure_evaluate(server_round, arrays, settings, grid)
            with self.clock("evaluate"):
                self.aggregate_evaluate(server_round, self.exchange.stream(messages))
            if self.unlabelled:
                record["served"] = {c: list(_expert_ids(n)) for c, n in self._served.items() if c in self.unlabelled}
            if self.results:
                record["evaluation"] = summarise(self.results, self.reading, self.num_experts, "gate" in self.vectors)
            due = c.run.inspect_every and server_round % c.run.inspect_every == 0
            if self.results and (last or due):
                with self.clock("inspect"):
                    record["inspection"] = inspect(
                        self.exchange, server_round, self.num_experts, self.results, self.vectors
                    )
                self.note_failures()
        self.seconds["transport"] = self.exchange.coding_seconds
        seconds = {name: total - timed[name] for name, total in self.seconds.items() if total > timed[name]}
        record |= self.exchange.traffic.since(before) | {"seconds": seconds | {"round": time.monotonic() - started}}
        record["failures"] = {str(client): reason for client, reason in self.round_failures.items()}
        return record

    def _prepare(self) -> None:
        """Have all clients embed their data; choose anchors unless the partition or a checkpoint names them."""
        c = self.config
        choose = c.cohort.anchor_selection != "partition" and not self.anchors
        self.exchange.sizes["mean-embedding"] = gate_inputs(self.common, c.common_expert.embedding)
        prepared = prepare_all(self.exchange, c, self.tracker, choose)
        self.samples = prepared.samples
        never_train = [client for client in self.samples if client >= c.partition.clients]
        self.unseen = [client for client in never_train if client in prepared.right]
        self.unlabelled = [client for client in never_train if client not in prepared.right]
        if choose:
            self.anchors = select_anchors(
                prepared.means, c.num_anchors, c.cohort.anchor_selection, derive(c.run.seed, "anchors")
            )
            log.info("anchors by %s: clients %s", c.cohort.anchor_selection, ", ".join(map(str, self.anchors)))
        self.anchors = self.anchors or tuple(range(c.num_anchors))
        self.checkpoints.anchors = self.anchors

    def _resume(self) -> int:
        """Load the newest good checkpoint if asked to; return the last finished round."""
        if not self.config.run.resume:
            self.checkpoints.clear()
        found = self.checkpoints.newest()
        self.tracker.cut_back(found.server_round if found else 0)
        if found is None:
            return 0
        self.vectors, self.anchors = found.vectors, tuple(found.facts["anchors"])
        log.info("going on after round %d", found.server_round)
        return found.server_round

    # Small helpers ---------------------------------------------------------------------------------------------------

    @property
    def drawn(self) -> str:
        """How cohorts are drawn."""
        return self.config.cohort.sampling or self.sampling

    @property
    def reading(self) -> str:
        """The read-out and prior correction that count as the method's accuracy."""
        return f"{self.config.personalize.read_out or self.read_out}/{self.config.personalize.prior}"

    def check(self, answer: Answer) -> None:
        """Raise BadReply if an answer to a train message must not be used."""
        check_trained(answer, self.samples[answer.client], self.vectors, self.config.limits)

    def _usable(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        for answer in answers:
            try:
                self.check(answer)
            except BadReply as error:
                self.exchange.reject(answer.client, str(error))
            else:
                yield answer

    def _prepared(self, clients: Sequence[int]) -> list[int]:
        """Return the clients of a cohort that were prepared; the others count as failed."""
        self.round_failures |= {c: "could not be prepared" for c in clients if c not in self.samples}
        return [client for client in clients if client in self.samples]

    def facts(self) -> dict[str, object]:
        """Return what ``summary.json`` says of this method besides its results."""
        served = self.experts_served
        gate = self.vectors["gate"].numel() if "gate" in self.vectors else 0
        p = self.config.privacy
        return {
            "privacy": spent(*self.ledger.read(), p.delta) if p.noise_multiplier or p.route_epsilon else {},
            "classes": list(self.dataset.classes),
            "image_shape": list(self.dataset.shape),
            "anchors": list(self.anchors),
            "trained_parameters": served * self.expert_layout.trained + gate,
            "flops_per_answer": served * self.expert_flops,
            "common_expert_parameters": self.common.num_parameters,
            "bytes_setup": len(self.common.as_bytes) * len(self.samples),
        }

    def note_failures(self) -> None:
        """Keep the failures of the last exchange for the round's record."""
        self.round_failures |= self.exchange.failures

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the round."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start


def _expert_ids(names: Sequence[str]) -> tuple[int, ...]:
    """Return m of every ``expert.m``."""
    return tuple(int(name.removeprefix("expert.")) for name in names if name.startswith("expert."))
