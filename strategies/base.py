"""What every method shares: the rounds, averaging, evaluation of unseen clients, checkpoints, results.

The global state is a table of flat vectors, ``expert.0`` .. ``expert.{M-1}`` and whatever else a method trains. It
stays here, on the server, and never becomes one big ArrayRecord: a client gets exactly the vectors that its job names.
A method says who trains what (:meth:`Method.plan`), how answers are merged, and what an unseen client is served.
"""

import logging
import time
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from fedjets_flwr.aggregation import RunningMeans, all_finite
from fedjets_flwr.checkpoint import Checkpoints
from fedjets_flwr.config import Config
from fedjets_flwr.data.datasets import Dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.evaluation import PRIORS, READINGS, ClientResult, routing, summarise
from fedjets_flwr.models.common import CommonExpert
from fedjets_flwr.models.experts import build_expert, expert_input, forward_flops
from fedjets_flwr.tracking import Tracker, facts_of
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.messages import Answer, BadReply, Job
from fedjets_flwr.wire.vector import FlatModel
from strategies.cohort import draw_cohort

log = logging.getLogger("flwr")


class Method(Strategy):
    """A federated method as a Flower strategy.

    Attributes:
        local: name of the clients' local algorithm (a module of ``client_app.local``).
        read_out: how an unseen client answers with its experts (a key of ``gating.READ_OUTS``).
        sampling: how a cohort is drawn unless ``cohort.sampling`` says otherwise.
        init: how experts start, ``random`` or ``common``; empty: as ``moe.init`` says.
        vectors: the global state.
        extra: vectors of the current round that jobs may name besides the state's.
        samples: training samples or, of unseen clients, samples to classify, by client id.
    """

    local: ClassVar[str]
    read_out: ClassVar[str] = "top-1"
    sampling: ClassVar[str] = "uniform"
    init: ClassVar[str] = ""

    def __init__(
        self, config: Config, common: CommonExpert, dataset: Dataset, tracker: Tracker, checkpoints: Checkpoints
    ) -> None:
        self.config, self.common, self.dataset = config, common, dataset
        self.tracker, self.checkpoints = tracker, checkpoints
        self.exchange: Exchange
        self.vectors: dict[str, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        self.samples: dict[int, int] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.round_failures: dict[int, str] = {}
        self.cohort: tuple[list[int], list[int]] = ([], [])

    # What a method decides -------------------------------------------------------------------------------------------

    @classmethod
    def validate(cls, config: Config) -> None:
        """Raise FedjetsError if the settings make no sense for this method."""

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
        self.expert_flops = forward_flops(experts[0].module, expert_input(self.config, self.common, self.dataset))
        self.exchange.sizes["expert"] = experts[0].layout.size
        self.exchange.facts |= {"expert-init": self.init, "expert-layout": experts[0].layout.digest}
        return {f"expert.{m}": expert.vector for m, expert in enumerate(experts)}

    @abstractmethod
    def plan(self, server_round: int, anchors: Sequence[int], normals: Sequence[int]) -> list[Job]:
        """Return who trains what in a round."""

    @abstractmethod
    def serve(self, server_round: int, clients: Sequence[int]) -> dict[int, tuple[str, ...]]:
        """Return the vectors that each unseen client receives for its answers."""

    def merge(self, server_round: int, answers: Iterable[Answer]) -> dict[str, float]:
        """Fold the answers of a round into the state: per-vector weighted means.

        Returns the sample-weighted mean of the clients' losses and the number of clients that trained each vector.
        """
        means, trained = RunningMeans(), Counter[str]()
        losses, weight_sum = 0.0, 0
        for answer in answers:
            samples, loss = int(answer.number("num-examples")), answer.number("loss")
            with self.clock("aggregate"):
                for name, vector in answer.vectors.items():
                    means.add(name, vector, self.weight_of(name, answer, samples))
            trained.update(answer.vectors.keys())
            losses += samples * loss
            weight_sum += samples
        with self.clock("aggregate"):
            self.vectors |= means.means()
        return {"loss": losses / weight_sum if weight_sum else float("nan"), **trained}

    def weight_of(self, name: str, answer: Answer, samples: int) -> float:
        """Return the weight of one vector of an answer in its average."""
        return samples if self.config.aggregation.weighting == "samples" else 1.0

    # Flower's hooks --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the train messages of a round."""
        sampling = self.config.cohort.sampling or self.sampling
        self.cohort = draw_cohort(self.config, server_round, sampling)
        self.exchange.refresh()
        jobs = self.plan(server_round, *self.cohort)
        return self.exchange.request(f"train.{self.local}", server_round, jobs, self.vectors | self.extra)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the state, in client-id order; the state stays here, so no arrays are returned."""
        self.trained = self.merge(server_round, self._usable(self.exchange.answers(replies)))
        self.note_failures()
        return None, MetricRecord(dict(self.trained))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluate messages to the unseen clients."""
        self._served = self.serve(server_round, self.unseen)
        jobs = [Job(c, names, cost=self.samples[c] * len(names)) for c, names in self._served.items()]
        return self.exchange.request("evaluate", server_round, jobs, self.vectors)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the unseen clients' counts in :attr:`results`."""
        self.results: dict[int, ClientResult] = {}
        for answer in self.exchange.answers(replies):
            try:
                self.results[answer.client] = self._client_result(answer)
            except BadReply as error:
                self.exchange.reject(answer.client, str(error))
        self.note_failures()
        if not self.results:
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
        c, arrays, settings = self.config, ArrayRecord(), ConfigRecord()
        self.exchange = Exchange(grid, c.limits.exchange_seconds, common=self.common)
        self.vectors = self.initial_vectors()
        first = self._resume() + 1
        self._prepare()
        for server_round in range(first, c.run.rounds + 1):
            started, before = time.monotonic(), self.exchange.traffic.copy()
            timed, self.round_failures = self.seconds.copy(), {}
            messages = self.configure_train(server_round, arrays, settings, grid)
            with self.clock("train"):
                self.aggregate_train(server_round, self.exchange.stream(messages))
            record: dict[str, object] = {"round": server_round, "loss": self.trained.pop("loss")}
            record |= {"cohort": sorted([*self.cohort[0], *self.cohort[1]]), "trained": self.trained}
            spent = self.exchange.traffic.since(before)
            last = server_round == c.run.rounds
            if last or server_round % c.run.evaluate_every == 0:
                messages = self.configure_evaluate(server_round, arrays, settings, grid)
                with self.clock("evaluate"):
                    self.aggregate_evaluate(server_round, self.exchange.stream(messages))
                record["bytes_served"] = self.exchange.traffic.down - before.down - spent["bytes_down"]
                record["evaluation"] = summarise(self.results, self.reading, self.num_experts)
                if last or (c.run.inspect_every and server_round % c.run.inspect_every == 0):
                    record["inspection"] = self._inspect(server_round)
            seconds = {name: total - timed[name] for name, total in self.seconds.items() if total > timed[name]}
            record |= spent | {"seconds": seconds | {"round": time.monotonic() - started}}
            record["failures"] = {str(client): reason for client, reason in self.round_failures.items()}
            self._too_many_failures(server_round)
            self.tracker.log(record)
            log.info("round %d/%d: %s", server_round, c.run.rounds, facts_of([record]))
            self.checkpoints.save(server_round, self.vectors, record, last)
        return Result()

    def _resume(self) -> int:
        """Load the newest good checkpoint if asked to; return the last finished round."""
        if not self.config.run.resume:
            self.checkpoints.clear()
        found = self.checkpoints.newest()
        self.tracker.cut_back(found.server_round if found else 0)
        if found is None:
            return 0
        self.vectors = found.vectors
        log.info("going on after round %d", found.server_round)
        return found.server_round

    def _prepare(self) -> None:
        """Have every client embed its data; keep the sizes and the controls of the unseen clients."""
        part = self.config.partition
        everyone = range(part.clients + part.unseen_clients)
        self.unseen = list(everyone[part.clients :])
        self.exchange.wait_for_nodes(everyone, self.config.limits.node_seconds)
        right: dict[int, list[int]] = {}
        computed = 0
        with self.clock("prepare"):
            for done, answer in enumerate(self.exchange.ask("query.prepare", 0, [Job(i) for i in everyone], {})):
                self.samples[answer.client] = int(answer.number("num-examples"))
                computed += int(answer.number("computed"))
                if answer.client >= part.clients:
                    right[answer.client] = answer.integers("common-right", len(PRIORS))
                if done % 10 == 9:
                    self.tracker.say(f"embedded the data of {done + 1} of {len(everyone)} clients")
        if self.exchange.failures:
            client, reason = next(iter(self.exchange.failures.items()))
            raise FedjetsError(f"client {client} could not be prepared: {reason}")
        means = [sum(right[u][i] / self.samples[u] for u in self.unseen) / len(self.unseen) for i in range(len(PRIORS))]
        per_client = {u: right[u][0] / self.samples[u] for u in self.unseen}
        names = ("common_expert", "common_expert_em", "common_expert_masked")
        self.tracker.set_controls(dict(zip(names, means, strict=True)), per_client, computed)

    def _inspect(self, server_round: int) -> dict[str, object]:
        """Measure every expert on every class of the unseen clients; this traffic is no part of the method."""
        experts = tuple(f"expert.{m}" for m in range(self.num_experts))
        jobs = [Job(client, experts, cost=self.samples[client]) for client in self.results]
        before = self.exchange.traffic.copy()
        shape = (self.num_experts, len(self.dataset.classes))
        right, classes = torch.zeros(shape), torch.zeros(shape[1])
        with self.clock("inspect"):
            for answer in self.exchange.ask("query.inspect", server_round, jobs, self.vectors):
                right += torch.tensor(answer.integers("right", shape[0] * shape[1])).view(shape)
                classes += self.results[answer.client].classes
        self.exchange.traffic = before
        accuracy = right / classes
        table = [[None if value != value else round(value, 6) for value in row] for row in accuracy.tolist()]
        return {"expert_class_accuracy": table, "routing": routing(self.results, accuracy)}

    # Small helpers ---------------------------------------------------------------------------------------------------

    @property
    def reading(self) -> str:
        """The read-out and prior correction that count as the method's accuracy."""
        return f"{self.config.personalize.read_out or self.read_out}/{self.config.personalize.prior}"

    def check(self, answer: Answer) -> tuple[int, float]:
        """Return an answer's sample count and loss.

        Raises:
            BadReply: it must not be used.
        """
        samples, loss = answer.number("num-examples"), answer.number("loss")
        if samples != self.samples[answer.client]:
            raise BadReply(f"num-examples = {samples}, not the {self.samples[answer.client]} it was prepared with")
        for name, vector in answer.vectors.items():
            if not all_finite(vector):
                raise BadReply(f"{name} is not finite")
        return int(samples), loss

    def _usable(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        for answer in answers:
            try:
                self.check(answer)
            except BadReply as error:
                self.exchange.reject(answer.client, str(error))
            else:
                yield answer

    def _client_result(self, answer: Answer) -> ClientResult:
        classes = len(self.dataset.classes)
        names = self._served[answer.client]
        experts = tuple(int(name.removeprefix("expert.")) for name in names if name.startswith("expert."))
        mass = answer.numbers.get("gate-mass")
        if answer.number("num-examples") != self.samples[answer.client] or not isinstance(mass, list):
            raise BadReply("num-examples or gate-mass is wrong")
        grid = (len(experts), classes)
        return ClientResult(
            experts=experts,
            samples=self.samples[answer.client],
            right=answer.integers("right", len(READINGS)),
            answered=torch.tensor(answer.integers("answered", grid[0] * grid[1])).view(grid),
            answered_right=torch.tensor(answer.integers("answered-right", grid[0] * grid[1])).view(grid),
            classes=torch.tensor(answer.integers("classes", classes)),
            gate_entropy=answer.number("gate-entropy"),
            gate_mass=[float(value) for value in mass],
        )

    def facts(self) -> dict[str, object]:
        """Return what ``summary.json`` says of this method besides its results."""
        names = next(iter(self._served.values()))
        served = sum(name.startswith("expert.") for name in names)
        gate = self.vectors["gate"].numel() if "gate" in names else 0
        return {
            "trained_parameters": served * self.expert_layout.trained + gate,
            "flops_per_answer": served * self.expert_flops,
            "common_expert_parameters": self.common.num_parameters,
            "bytes_setup": len(self.common.to_bytes()) * len(self.samples),
        }

    def note_failures(self) -> None:
        """Keep the failures of the last exchange for the round's record."""
        self.round_failures |= self.exchange.failures

    def _too_many_failures(self, server_round: int) -> None:
        cohort = [client for group in self.cohort for client in group]
        failed = [client for client in cohort if client in self.round_failures]
        if len(failed) > self.config.limits.max_failure_share * len(cohort):
            raise FedjetsError(
                f"round {server_round}: {len(failed)} of {len(cohort)} clients failed, more than"
                f" limits.max-failure-share = {self.config.limits.max_failure_share:g};"
                f" client {failed[0]}: {self.round_failures[failed[0]]}"
            )

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the round."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start
