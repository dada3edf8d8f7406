"""The rounds of a run: who is asked what in which order, whatever the method.

One round: (0) the method may ask clients what it must know; (1) where it routes, the gate goes to the normal clients of
the cohort and the ids of their experts come back, unless they can choose as they begin to train; (2) every client gets
the vectors that its job names and trains; (3) each reply is checked and the good ones are averaged, vector by vector;
(4) every E rounds the unseen clients are routed, served and scored, and clients that train, where they hold test parts,
adapt what they are served and are scored on those. What the round was goes to the callbacks.
"""

import logging
import math
import time
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from statistics import median

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import (
    Aggregator,
    PooledMeans,
    RunningMeans,
    all_finite,
    bounded_weights,
    grew,
    make_aggregator,
)
from fedjets_flwr.federation.cohort import Cohort, draw_participants
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.federation.privacy import Ledger, PrivateMeans, release_of
from fedjets_flwr.federation.reply_checks import OtherData, bounded_mean, read_experts, stop_if_too_many_failed
from fedjets_flwr.federation.validated import Validated
from fedjets_flwr.moe.metrics import ClientResult, summarise
from fedjets_flwr.names import MICRO, UNSEEN, USUAL, VALIDATION, expert_ids, expert_name
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.runs.score import BITS_PER_BYTE, UNSEEN_ACCURACY, VALIDATION_ACCURACY, Score
from fedjets_flwr.wire.backoff import Backoff
from fedjets_flwr.wire.exchange import Exchange, PendingExchange
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from server_app.evaluation import inspect, read_entropy, read_result, score_participants
from server_app.preparation import Prepared, prepare
from strategies.base import Routes, Strategy

log = logging.getLogger("flwr")

SMALL = 2**25
"""Bytes of all experts up to which copying those that nobody chooses takes less than an exchange more."""


class Rounds(FlowerStrategy):
    """Does a method's rounds, as a strategy of Flower's.

    Flower's own ``Strategy.start`` can drive it too: the hooks do what Flower says of them, but that the state stays
    here, on the server, and never becomes an ArrayRecord: a client gets exactly the vectors that its job names.

    Attributes:
        strategy: the method, with the state.
        exchange: with the SuperNodes.
        ledger: of what privacy counts.
        unseen: clients that never train and whose labels score the method.
        validation: clients that never train and by whose scores settings are chosen; where there are some, the unseen
            ones are scored once, after the last round.
        unlabelled: clients that never train and have no labels; experts are chosen for them all the same.
        participants: clients that train and are scored on a test part of their own.
        cohort: of the current round.
        failures: of the current round, reasons by client id.
        resting: clients that the current round does not ask, since they were late before.
        last: the last round: ``run.rounds``, or the one that the method said is enough.
        changed: clients whose data is no longer what they were prepared with; the next round begins with that.
        usual: how sure experts are of their anchors' samples, by expert; empty: no read-out asks, or nobody told.
        seconds: of the run's parts so far.
    """

    def __init__(
        self, strategy: Strategy, exchange: Exchange, prepared: Prepared, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.strategy, self.exchange, self.callbacks = strategy, exchange, list(callbacks)
        self.config = strategy.config
        self.ledger = Ledger(self.config.run_dir)
        self.unseen: list[int] = []
        self.validation: list[int] = []
        self.unlabelled: list[int] = []
        self.take(prepared)
        scored = self.config.partition.test_share > 0 or not strategy.task.classifies
        self.participants = draw_participants(self.config) if scored else []
        self.cohort = Cohort((), (), 0)
        self.failures: dict[int, str] = {}
        self.resting: list[int] = []
        self.last = self.config.run.rounds
        self.changed: set[int] = set()
        self._late: Backoff[int] = Backoff()
        self._node_seconds = min(self.config.limits.node_seconds, self.config.limits.exchange_seconds)
        self.usual: dict[int, float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.results: dict[int, ClientResult] = {}
        self._judge = _judge(strategy) if self.config.aggregation.rule == "validated" else None
        self._pending: PendingExchange
        self._metrics: dict[str, float] = {}
        self._left: dict[str, str] = {}  # vectors that a round leaves as they were, and why
        self._evaluations: dict[str, dict[str, object]] = {}
        self._served: dict[int, tuple[str, ...]] = {}
        self._ahead: Routes = {}  # of the next cohort, asked along with the unseen clients: the gate is the same
        self._replaced: dict[str, Tensor] = {}  # the round before last: memory for the next means

    def take(self, prepared: Prepared) -> None:
        """Note what clients hold that were prepared, how much it counts, and who of them never trains."""
        strategy, training = self.strategy, self.config.partition.clients
        labelled = {UNSEEN: self.unseen, VALIDATION: self.validation}
        for client in sorted(client for client in prepared.num_samples if client >= training):
            for kind in (*labelled.values(), self.unlabelled):
                if client in kind:
                    kind.remove(client)
            known = client in prepared.right
            insort(labelled[self.config.partition.role_of(client)] if known else self.unlabelled, client)
        strategy.num_samples |= prepared.num_samples
        strategy.opted_out |= prepared.opted_out
        held = {client: count for client, count in strategy.num_samples.items() if client < training}
        strategy.weights = bounded_weights(held, self.config.aggregation.max_weight)

    @property
    def score(self) -> Score:
        """What the run is judged by."""
        if not self.strategy.task.classifies:
            return BITS_PER_BYTE
        validated = self.validation and self.strategy.score is UNSEEN_ACCURACY
        return VALIDATION_ACCURACY if validated else self.strategy.score

    # Flower's hooks --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the train messages of a round; asks the cohort's clients for their experts before."""
        strategy = self.strategy
        drawn = strategy.cohort(server_round)
        self.resting = [client for client in drawn.clients if self._late.resting(client, server_round)]
        self.cohort = drawn.only(set(drawn.clients) - set(self.resting))
        self.exchange.nodes.refresh(self._asked_in(server_round), self._node_seconds)
        strategy.opted_out |= self.exchange.nodes.opted_out  # a site may change its mind
        self.cohort = self.cohort.only(set(self.cohort.clients) - strategy.opted_out)
        unprepared = self._prepare_anew(server_round)
        present = self.cohort.only(strategy.num_samples)
        lost = set(self.cohort.clients) - set(present.clients)
        self.failures |= {client: unprepared.get(client, "could not be prepared") for client in sorted(lost)}
        self.failures |= {client: why for client, why in unprepared.items() if client >= self.config.partition.clients}
        self._ask(server_round, present)
        wanted = strategy.to_route(present)
        routes = {client: self._ahead[client] for client in wanted if client in self._ahead}
        self._ahead = {}
        undecided = [client for client in wanted if client not in routes]
        jobs = self._open_jobs(server_round, undecided)
        if not jobs:
            routes |= self.route(server_round, undecided)
        jobs += strategy.plan(present, routes)
        self._pending = self.request(f"train.{strategy.algorithm}", server_round, jobs)
        return self._pending.messages

    def _open_jobs(self, server_round: int, clients: Sequence[int]) -> list[Job]:
        """Return jobs by which clients choose their experts themselves, in one exchange; none where two are better."""
        strategy = self.strategy
        experts = sum(strategy.vectors[name].nbytes for name in strategy.expert_names) if clients else 0
        if not 0 < experts <= SMALL or not self.exchange.shares_memory:
            return []
        jobs = [job for client in clients if (job := strategy.open_job(client)) is not None]
        if len(jobs) < len(clients):
            return []
        if self.config.privacy.route_epsilon > 0:
            self.ledger.routes(server_round, clients, self.config.privacy.route_epsilon)
        return jobs

    def _ask(self, server_round: int, cohort: Cohort) -> None:
        """Ask clients what the method must know before it plans a round with a cohort."""
        strategy = self.strategy
        if not (jobs := strategy.questions(cohort)):
            return
        with self.clock("select"):
            pending, good = self.request(f"query.{strategy.algorithm}", server_round, jobs), list[Reply]()
            for reply in pending.replies():
                try:
                    strategy.check_answer(reply)
                    good.append(reply)
                except BadReply as error:
                    pending.reject(reply.client, str(error))
        self.failures |= pending.failures
        self._note_late(server_round, pending)
        strategy.learn(good)

    def _prepare_anew(self, server_round: int) -> dict[int, str]:
        """Prepare the clients of the round that could not be before, and all whose data changed; some may be late.

        Returns why clients could not be prepared.
        """
        part, wanted = self.config.partition, self.cohort.clients
        if self._evaluates(server_round):
            never_train = range(part.clients, part.all_clients)
            wanted += [client for client in never_train if not self._late.resting(client, server_round)]
        unknown = {client for client in wanted if client not in self.strategy.num_samples}
        changed = {client for client in self.changed if not self._late.resting(client, server_round)}
        self.changed -= changed
        if not (anew := sorted(unknown | changed)):
            return {}
        prepared = prepare(self.exchange, self.config, anew)
        self.take(prepared)
        for client in prepared.late:
            self._late.silent(client, server_round)
        return {client: f"could not be prepared: {why}" for client, why in prepared.failures.items()}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the state, in client-id order; return the mean loss and how many trained each vector.

        Raises:
            FedjetsError: too many clients failed; the state is as before.
        """
        self._metrics = self.merge(server_round, self._usable(self._pending.read(replies)))
        self._note_late(server_round, self._pending)
        return None, MetricRecord(dict(self._metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluate messages to the unseen clients; where a gate routes, it is asked for their experts."""
        strategy, clients = self.strategy, self._scored_in(server_round)
        coming: list[int] = []
        if strategy.routed and server_round < self.last:
            coming = list(strategy.to_route(strategy.cohort(server_round + 1).only(strategy.num_samples)))
        routes = self.route(server_round, [*clients, *coming]) if strategy.routed else {}
        self._ahead = {client: routes[client] for client in coming if client in routes}
        self._served = strategy.serve(clients, routes)
        if strategy.vouched:
            self._vouch(server_round)
        jobs = [
            Job(c, self._served[c], numbers=self._usual_of(c), cost=strategy.num_samples[c])
            for c in clients
            if c in self._served and c not in self.unlabelled
        ]
        self._pending = self.request("evaluate", server_round, jobs)
        return self._pending.messages

    def _vouch(self, server_round: int) -> None:
        """Ask every anchor how sure its expert is of its samples; of one that fails what it last told still counts."""
        strategy, classes = self.strategy, len(self.strategy.task.spec.classes)
        bound = dict(zip(strategy.anchors, range(strategy.num_experts), strict=False))
        present = strategy.num_samples.keys() - strategy.opted_out
        asked = [c for c in bound if c in present and not self._late.resting(c, server_round)]
        jobs = [Job(c, (expert_name(bound[c]),), cost=strategy.num_samples[c]) for c in asked]
        with self.clock("select"):
            pending = self.request("query.vouch", server_round, jobs, served=True)
            for reply in pending.replies():
                try:
                    self.usual[bound[reply.client]] = read_entropy(reply, classes)
                except BadReply as error:
                    pending.reject(reply.client, str(error))
        self.failures |= pending.failures
        self._note_late(server_round, pending)

    def _usual_of(self, client: int) -> dict[str, int]:
        """Return how sure an unseen client's first expert, and the common expert, usually are, as its job tells it.

        An expert of which nobody told stands in the middle of the others.
        """
        if not self.usual:
            return {}
        first = expert_ids(self._served[client])[0]
        expert = self.usual.get(first, median(self.usual.values()))
        told = zip(USUAL, (expert, self.strategy.common.usual_entropy), strict=True)
        return {name: round(nats * MICRO) for name, nats in told}

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the counts of clients that never train in :attr:`results`; return the method's accuracy."""
        self.results = {}
        for reply in self._pending.read(replies):
            try:
                samples, columns = self.strategy.num_samples[reply.client], len(self.strategy.task.spec.columns)
                self.results[reply.client] = read_result(
                    reply,
                    expert_ids(self._served[reply.client]),
                    samples,
                    columns,
                    self.config.limits.max_samples,
                    compared=bool(self.usual),
                )
            except BadReply as error:
                self._reject(reply.client, error)
        self.failures |= self._pending.failures
        asked = set(self._scored_in(server_round)).difference(self.unlabelled)
        again = server_round < self.last and not self.changed.isdisjoint(asked)
        if asked and not self.results and not again:
            raise FedjetsError(f"round {server_round}: no unseen client answered; the log above has the reasons")
        self._evaluations = {}
        for kind, clients in (("validation", self.validation), ("evaluation", self.unseen)):
            if answered := {client: self.results[client] for client in clients if client in self.results}:
                strategy, gated = self.strategy, "gate" in self.strategy.vectors
                self._evaluations[kind] = summarise(answered, strategy.reading, strategy.num_experts, gated)
        accuracies = [evaluation["accuracy"] for evaluation in self._evaluations.values()]
        return MetricRecord({"accuracy": accuracies[-1]}) if accuracies else None  # type: ignore[dict-item]

    def summary(self) -> None:
        """Log what the run is."""
        c = self.config
        log.info("%s on %s, %d rounds -> %s", c.strategy.name, c.data.name, c.run.rounds, c.run_dir)

    # The rounds ------------------------------------------------------------------------------------------------------

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, *, first: int = 1, **_: object
    ) -> Result:
        """Do the rounds from ``first`` to the last; with none to do, only serve and score the unseen clients.

        Raises:
            FedjetsError: too many clients failed, or no node came.
        """
        for server_round in self._numbers(first):
            before, notes = dict(self.strategy.vectors), self.strategy.notes()
            try:
                record = self._round(server_round, grid)
            except (Exception, SystemExit):  # SystemExit: Flower's way to stop a deployed ServerApp
                self.strategy.recall(notes)
                for callback in self.callbacks:
                    with suppress(FedjetsError):
                        callback.on_broken_off(server_round - 1, before)
                raise
            for callback in self.callbacks:
                callback.on_round(record, self.strategy.vectors)
        return Result()

    def _numbers(self, first: int) -> Iterator[int]:
        """Yield the numbers of the rounds to do; a method may end them."""
        if not self.config.run.rounds:
            yield 0
        for server_round in range(first, self.config.run.rounds + 1):
            if self.strategy.done:
                return
            yield server_round

    def _round(self, server_round: int, grid: Grid) -> dict[str, object]:
        """Do one round and return its record."""
        c, strategy, arrays, settings = self.config, self.strategy, ArrayRecord(), ConfigRecord()
        started, before = time.monotonic(), self.exchange.traffic.copy()
        timed, self.failures, self._left = self.seconds.copy(), {}, {}
        if server_round:
            messages = self.configure_train(server_round, arrays, settings, grid)
            with self.clock("train"):
                self.aggregate_train(server_round, self.exchange.stream(messages))
        trained = {"loss": math.nan} | self._metrics
        record: dict[str, object] = {"round": server_round, "loss": trained.pop("loss")}
        record |= {"cohort": self.cohort.clients, "trained": trained}
        merged = time.monotonic()
        if server_round and (metrics := strategy.after_merge(server_round)):
            self.seconds["server"] += time.monotonic() - merged
            record["metrics"] = dict(metrics)
        if server_round and strategy.done:
            self.last = server_round
        last = server_round == self.last
        if last and server_round < c.run.rounds:
            log.info("round %d: the model becomes no better; it stays as it was at its best", server_round)
            record["ended"] = True
        if self._evaluates(server_round):
            record |= self._evaluate(server_round, arrays, settings, grid, last)
        every = c.participants.evaluate_every
        if self.participants and (last or (every and server_round % every == 0)):
            record |= self._score_participants(server_round)
        record |= self.score.of(record)
        self.seconds["transport"] = self.exchange.coding_seconds
        seconds = {name: total - timed[name] for name, total in self.seconds.items() if total > timed[name]}
        record |= self.exchange.traffic.since(before) | {"seconds": seconds | {"round": time.monotonic() - started}}
        record["failures"] = {str(client): reason for client, reason in self.failures.items()}
        if self._left:
            record["left"] = self._left
        if self.resting:
            record["resting"] = self.resting
        if refused := self.exchange.nodes.refused:
            record["refused_nodes"] = dict(refused)
            refused.clear()
        return record

    def _evaluate(
        self, server_round: int, arrays: ArrayRecord, settings: ConfigRecord, grid: Grid, last: bool
    ) -> dict[str, object]:
        """Score the state on clients that never train and return what the round's record says of it."""
        found: dict[str, object] = {}
        messages = self.configure_evaluate(server_round, arrays, settings, grid)
        with self.clock("evaluate"):
            self.aggregate_evaluate(server_round, self.exchange.stream(messages))
        if self.usual:
            found["usual"] = dict(sorted(self.usual.items()))
        if self.unlabelled:
            found["served"] = {c: list(expert_ids(n)) for c, n in self._served.items() if c in self.unlabelled}
        if not self.results:
            return found
        found |= self._evaluations
        every = self.config.run.inspect_every
        if last or (every and server_round % every == 0):
            with self.clock("inspect"):
                unseen = {client: result for client, result in self.results.items() if client in self.unseen}
                looked_at = unseen or self.results
                found["inspection"], failed = inspect(self.exchange, server_round, self.strategy, looked_at)
            self.failures |= failed
        return found

    def _score_participants(self, server_round: int) -> dict[str, object]:
        """Score the clients that train on their own test parts and return what the round's record says of it."""
        strategy = self.strategy
        apart = set(self.participants) & strategy.opted_out if strategy.routed else set()
        known = (strategy.num_samples.keys() | strategy.opted_out) - apart
        present = [client for client in self.participants if client in known]
        with self.clock("participants"):
            routes = self.route(server_round, present, served=True) if strategy.routed else {}
            found, failed = score_participants(
                self.exchange,
                server_round,
                strategy,
                strategy.personal(present, routes),
                tuned=self.config.participants.tuned and server_round == self.last,
            )
        lost = set(self.participants) - set(present) - apart
        self.failures |= failed | dict.fromkeys(sorted(lost), "could not be prepared")
        self.failures |= dict.fromkeys(sorted(apart), "it opted out: the gate is not asked for its experts")
        if failed and not found and server_round == self.last:
            reason = next(iter(failed.values()))
            raise FedjetsError(
                f"round {server_round}: no client could be scored on its own test part; one says: {reason}"
            )
        return {"participants": found} if found else {}

    # Parts of a round ------------------------------------------------------------------------------------------------

    def request(self, kind: str, server_round: int, jobs: Sequence[Job], served: bool = False) -> PendingExchange:
        """Return an exchange of the method's vectors; ``served``: for predictions of the clients' own."""
        size_of = partial(_size, self.strategy)  # no reference to the rounds: with them the run folder's lock goes
        return self.exchange.request(kind, server_round, jobs, self.strategy.outgoing(jobs), size_of, served)

    def route(self, server_round: int, clients: Sequence[int], served: bool = False) -> dict[int, tuple[int, ...]]:
        """Ask clients which experts the current gate picks for their data; a client that fails is left out."""
        if not clients:
            return {}
        strategy, epsilon = self.strategy, self.config.privacy.route_epsilon
        jobs = [Job(client, ("gate",), cost=strategy.num_samples[client]) for client in clients]
        if epsilon > 0:
            self.ledger.routes(server_round, clients, epsilon)
        routes = {}
        with self.clock("select"):
            pending = self.request("query.route", server_round, jobs, served)
            for reply in pending.replies():
                try:
                    routes[reply.client] = read_experts(reply, self.config.moe.top_k, strategy.num_experts)
                except BadReply as error:
                    pending.reject(reply.client, str(error))
        self.failures |= pending.failures
        self._note_late(server_round, pending)
        return routes

    def _note_late(self, server_round: int, pending: PendingExchange) -> None:
        """Ask clients that did not answer in time less often."""
        for client in pending.jobs:
            if client in pending.late:
                self._late.silent(client, server_round)
            elif client not in pending.failures:
                self._late.answered(client)

    def _asked_in(self, server_round: int) -> list[int]:
        """Return the clients that a round asks, where it evaluates unseen ones and anchors that vouch for experts."""
        if not self._evaluates(server_round):
            return list(self.cohort.clients)
        vouching = self.strategy.anchors if self.strategy.vouched else ()
        return [*self.cohort.clients, *self._scored_in(server_round), *vouching]

    def _evaluates(self, server_round: int) -> bool:
        """Return whether a round scores clients that never train."""
        due = server_round == self.last or server_round % self.config.run.evaluate_every == 0
        return self.strategy.serves_unseen and self.strategy.task.classifies and due

    def _scored_in(self, server_round: int) -> list[int]:
        """Return the clients that never train which a round serves, if it evaluates."""
        choosing = self.validation and server_round < self.last
        return [*self.validation, *([] if choosing else [*self.unseen, *self.unlabelled])]

    def merge(self, server_round: int, replies: Iterable[Reply]) -> dict[str, float]:
        """Make the next state of usable replies.

        Returns the sample-weighted mean of the clients' losses and the number of clients that trained each vector.

        Raises:
            FedjetsError: too many clients failed; the state is as before.
        """
        strategy, aggregator = self.strategy, self.aggregator()
        losses, weights, kept = list[float](), list[float](), dict[str, Tensor]()
        for reply in replies:
            with self.clock("aggregate"):
                for name, vector in strategy.averaged(reply).items():
                    aggregator.add(name, vector, strategy.weight_of(name, reply))
                kept |= strategy.kept(server_round, reply)
            losses.append(reply.number("loss"))
            weights.append(strategy.weights[reply.client])
        answered = len(losses)
        stop_if_too_many_failed(server_round, self.cohort.clients, self.failures, self.config.limits)
        if answered >= self.config.limits.min_replies:
            if aggregator.counts and self.config.privacy.noise_multiplier > 0:
                self.ledger.sums(server_round, release_of(self.config, strategy.drawn))
            with self.clock("aggregate"):
                averages = self._averages(server_round, aggregator)
                self._replaced |= {name: strategy.vectors[name] for name in averages}
                strategy.merge(averages, kept)
        elif self.cohort.clients:
            log.warning("round %d: %d replies, fewer than limits.min-replies; weights stay", server_round, answered)
        return {"loss": bounded_mean(losses, weights), **aggregator.counts}

    def aggregator(self) -> Aggregator:
        """Return what combines this round's vectors: private, robust, or the running mean."""
        vectors, settings = self.strategy.vectors, self.config.aggregation
        if self.config.privacy.noise_multiplier > 0:
            return PrivateMeans(vectors, self.config.privacy, self.strategy.vectors_moved)
        if self._judge is not None:
            return Validated(vectors, settings, self._judge)
        if settings.bn == "pooled":
            specs = self.strategy.specs
            means, variances = (
                {name: spec.positions(leaf) for name, spec in specs.items()} for leaf in ("running_mean", "running_var")
            )
            return PooledMeans(means, variances, RunningMeans(self._replaced))
        return make_aggregator(settings, vectors, self._replaced)

    def _averages(self, server_round: int, aggregator: Aggregator) -> dict[str, Tensor]:
        """Return the averages that may take the place of the state's vectors."""
        limits, old, found = self.config.limits, self.strategy.vectors, {}
        for name, vector in aggregator.result().items():
            if not all_finite(vector):  # finite replies can still overflow together
                self._leave(server_round, name, "its mean is not finite")
            elif grew(vector, old[name], limits.max_growth):  # no reply need be bad by itself
                self._leave(server_round, name, f"its mean is over {limits.max_growth:g} times as long as it was")
            elif aggregator.counts[name] >= limits.min_replies_per_expert:
                found[name] = vector
        return found

    def _leave(self, server_round: int, name: str, reason: str) -> None:
        log.warning("round %d: %s stays as it was: %s", server_round, name, reason)
        self._left[name] = reason

    def _usable(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        for given in replies:
            try:
                reply = self._as_chosen(given)
                self.strategy.check(reply)
                if self._judge is not None:
                    with self.clock("judge"):
                        self._judge.check(reply, self.strategy.vectors)
            except BadReply as error:
                self._reject(given.client, error)
            else:
                yield reply
        self.failures |= self._pending.failures

    def _as_chosen(self, reply: Reply) -> Reply:
        """Return a reply with the names of the experts that its client chose itself, and count what it received.

        Raises:
            BadReply: they are no K experts.
        """
        job = self._pending.jobs[reply.client]
        if not job.choose:
            return reply
        experts = read_experts(reply, job.choose, self.strategy.num_experts)
        chosen = self._pending.jobs[reply.client] = job.chosen(experts)
        self.exchange.count_down(reply.client, map(expert_name, experts), self.strategy.vectors)
        vectors = {name: reply.vectors[slot] for slot, name in zip(job.returns, chosen.returns, strict=True)}
        return replace(reply, vectors=vectors)

    def _reject(self, client: int, error: BadReply) -> None:
        """Note why a reply of the exchange under way is not used, and who has other data by now."""
        self._pending.reject(client, str(error))
        if isinstance(error, OtherData):
            self.changed.add(client)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the round."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start


def _judge(strategy: Strategy) -> Judge:
    return Judge.of(strategy.config, strategy.task, strategy.common, strategy.architectures)


def _size(strategy: Strategy, name: str) -> int:
    return strategy.spec_of(name).size
