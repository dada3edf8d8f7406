"""The rounds of a run: who is asked what in which order, whatever the method.

One round: (0) the method may ask clients what it must know; (1) where it routes, the gate goes to the normal clients of
the cohort and the ids of their experts come back, unless they can choose as they begin to train; (2) every client gets
the vectors that its job names and trains; (3) each reply is checked and the good ones are averaged, vector by vector;
(4) every E rounds clients are served and scored (:mod:`server_app.scoring`). What the round was goes to the callbacks.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

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
    grew,
    make_aggregator,
)
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.federation.privacy import PrivateMeans, release_of
from fedjets_flwr.federation.reply_checks import bounded_mean, read_experts, stop_if_too_many_failed
from fedjets_flwr.federation.validated import Validated
from fedjets_flwr.names import expert_name
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.wire.exchange import Exchange, PendingExchange
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from server_app.clients import Clients
from server_app.preparation import Prepared
from server_app.scoring import Scoring
from server_app.stopwatch import Stopwatch
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
        clients: of the run.
        scoring: of what they are served.
        watch: of the run's parts.
        cohort: of the current round, without those who rest.
        resting: drawn clients that the current round does not ask, since they were late before.
        last: the last round: ``run.rounds``, or the one that the method said is enough.
    """

    def __init__(
        self, strategy: Strategy, exchange: Exchange, prepared: Prepared, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.strategy, self.exchange, self.callbacks = strategy, exchange, list(callbacks)
        self.config = strategy.config
        self.watch = Stopwatch()
        self.clients = Clients(strategy, exchange, prepared, self.watch)
        self.scoring = Scoring(self.clients, self.watch)
        self.cohort = Cohort((), (), 0)
        self.resting: list[int] = []
        self.last = self.config.run.rounds
        self._node_seconds = min(self.config.limits.node_seconds, self.config.limits.exchange_seconds)
        self._judge = _judge(strategy) if self.config.aggregation.rule == "validated" else None
        self._pending: PendingExchange
        self._metrics: dict[str, float] = {}
        self._left: dict[str, str] = {}  # vectors that a round leaves as they were, and why
        self._ahead: Routes = {}  # of the next cohort, asked along with the unseen clients: the gate is the same
        self._replaced: dict[str, Tensor] = {}  # the round before last: memory for the next means

    # Flower's hooks --------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the train messages of a round; asks the cohort's clients for their experts before."""
        strategy, clients = self.strategy, self.clients
        self._draw(server_round)
        if clients.opt_out(self.exchange.nodes.opted_out):  # a site may change its mind
            self._draw(server_round)
        present = self._prepared(server_round)
        if jobs := strategy.questions(present):
            answers = clients.ask(f"query.{strategy.algorithm}", server_round, jobs, self._checked)
            strategy.learn(list(answers.values()))
        wanted = strategy.to_route(present)
        routes = {client: self._ahead[client] for client in wanted if client in self._ahead}
        self._ahead = {}
        undecided = [client for client in wanted if client not in routes]
        jobs = self._open_jobs(server_round, undecided)
        if not jobs:
            routes |= clients.route(server_round, undecided)
        jobs = [*jobs, *strategy.plan(present, routes)]
        self._pending = clients.request(f"train.{strategy.algorithm}", server_round, jobs)
        return self._pending.messages

    def _draw(self, server_round: int) -> None:
        """Draw the cohort and wait for its nodes; who rests, or has opted out though it was drawn, is not asked."""
        drawn = self.strategy.cohort(server_round)
        willing = drawn.only(set(drawn.clients) - self.strategy.opted_out)
        self.cohort = willing.only(set(self.clients.awake(willing.clients, server_round)))
        self.resting = [client for client in willing.clients if client not in self.cohort.clients]
        self.exchange.nodes.refresh(self._asked_in(server_round), self._node_seconds)

    def _prepared(self, server_round: int) -> Cohort:
        """Return who of the cohort can train, once clients are prepared that could not be, or whose data is new."""
        part, clients, wanted = self.config.partition, self.clients, list(self.cohort.clients)
        if self.scoring.due(server_round, self._is_last(server_round)):
            wanted += clients.awake(range(part.clients, part.all_clients), server_round)
        unprepared = clients.prepare(server_round, wanted)
        present = self.cohort.only(self.strategy.num_samples)
        lost = set(self.cohort.clients) - set(present.clients)
        clients.failures |= {client: unprepared.get(client, "could not be prepared") for client in sorted(lost)}
        clients.failures |= {client: why for client, why in unprepared.items() if client >= part.clients}
        return present

    def _checked(self, reply: Reply) -> Reply:
        """Return an answer to a method's question, if it may be used."""
        self.strategy.check_answer(reply)
        return reply

    def _open_jobs(self, server_round: int, ids: Sequence[int]) -> list[Job]:
        """Return jobs by which clients choose their experts themselves, in one exchange; none where two are better."""
        strategy = self.strategy
        experts = sum(strategy.vectors[name].nbytes for name in strategy.expert_names) if ids else 0
        if not 0 < experts <= SMALL or not self.exchange.shares_memory:
            return []
        jobs = [job for client in ids if (job := strategy.open_job(client)) is not None]
        if len(jobs) < len(ids):
            return []
        self.clients.count_routes(server_round, ids)
        return jobs

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies into the state, in client-id order; return the mean loss and how many trained each vector.

        Raises:
            FedjetsError: too many clients failed; the state is as before.
        """
        self._metrics = self.merge(server_round, self._usable(self._pending.read(replies)))
        self.clients.note(server_round, self._pending)
        del self._pending  # what it holds of messages would stay beside the next ones
        return None, MetricRecord(dict(self._metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the evaluate messages to the clients that never train; the next cohort is routed along with them."""
        strategy, last = self.strategy, self._is_last(server_round)
        routes: Routes = {}
        if strategy.routed:
            coming = [] if last else self._routed_next(server_round + 1)
            routes = self.clients.route(server_round, [*self.scoring.scored(last), *coming])
            self._ahead = {client: routes[client] for client in coming if client in routes}
        return self.scoring.serve(server_round, last, routes)

    def _routed_next(self, server_round: int) -> list[int]:
        """Return whom the gate routes in a round to come, as far as one knows by now."""
        cohort = self.strategy.cohort(server_round).only(self.strategy.num_samples.keys() - self.strategy.opted_out)
        return self.clients.awake(self.strategy.to_route(cohort), server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect what the clients that never train replied; return the method's accuracy."""
        return self.scoring.collect(server_round, self._is_last(server_round), replies)

    def _is_last(self, server_round: int) -> bool:
        return server_round >= self.last

    def summary(self) -> None:
        """Log what the run is."""
        c = self.config
        log.info("%s on %s, %d rounds -> %s", c.strategy.name, c.data.name, c.run.rounds, c.run_dir)

    # The rounds ------------------------------------------------------------------------------------------------------

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, *, first: int | None = None, **_: object
    ) -> Result:
        """Do the rounds from ``first`` to the last; 0, which only serves and scores the unseen clients, if none trains.

        Raises:
            FedjetsError: too many clients failed, or no node came.
        """
        for server_round in self._numbers(min(1, self.config.run.rounds) if first is None else first):
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
        for server_round in range(first, self.config.run.rounds + 1):
            if self.strategy.done:
                return
            yield server_round

    def _round(self, server_round: int, grid: Grid) -> dict[str, object]:
        """Do one round and return its record."""
        c, strategy, clients, scoring = self.config, self.strategy, self.clients, self.scoring
        arrays, settings = ArrayRecord(), ConfigRecord()
        started, before = time.monotonic(), self.exchange.traffic.copy()
        timed, clients.failures, self._left = self.watch.seconds.copy(), {}, {}
        if server_round:
            messages = self.configure_train(server_round, arrays, settings, grid)
            with self.watch.part("train"):
                self.aggregate_train(server_round, self.exchange.stream(messages))
        trained = {"loss": math.nan} | self._metrics
        record: dict[str, object] = {"round": server_round, "loss": trained.pop("loss")}
        record |= {"cohort": self.cohort.clients, "trained": trained}
        merged = time.monotonic()
        if server_round and (metrics := strategy.after_merge(server_round)):
            self.watch.seconds["server"] += time.monotonic() - merged
            record["metrics"] = dict(metrics)
        if server_round and strategy.done:
            self.last = server_round
        last = self._is_last(server_round)
        if last and server_round < c.run.rounds:
            log.info("round %d: the model becomes no better; it stays as it was at its best", server_round)
            record["ended"] = True
        if scoring.due(server_round, last):
            messages = self.configure_evaluate(server_round, arrays, settings, grid)
            with self.watch.part("evaluate"):
                self.aggregate_evaluate(server_round, self.exchange.stream(messages))
            record |= scoring.record(server_round, last)
        every = c.participants.evaluate_every
        if clients.participants and (last or (every and server_round % every == 0)):
            record |= scoring.own_tests(server_round, last)
        record |= scoring.score.of(record)
        self.watch.seconds["transport"] = self.exchange.coding_seconds
        seconds = {name: total - timed[name] for name, total in self.watch.seconds.items() if total > timed[name]}
        record |= self.exchange.traffic.since(before) | {"seconds": seconds | {"round": time.monotonic() - started}}
        record["failures"] = {str(client): reason for client, reason in clients.failures.items()}
        if self._left:
            record["left"] = self._left
        if self.resting:
            record["resting"] = self.resting
        if refused := self.exchange.nodes.refused:
            record["refused_nodes"] = dict(refused)
            refused.clear()
        return record

    # Parts of a round ------------------------------------------------------------------------------------------------

    def _asked_in(self, server_round: int) -> list[int]:
        """Return the clients that a round asks."""
        last = self._is_last(server_round)
        return [*self.cohort.clients, *(self.scoring.asked(last) if self.scoring.due(server_round, last) else ())]

    def merge(self, server_round: int, replies: Iterable[Reply]) -> dict[str, float]:
        """Make the next state of usable replies.

        Returns the sample-weighted mean of the clients' losses and the number of clients that trained each vector.

        Raises:
            FedjetsError: too many clients failed; the state is as before.
        """
        strategy, aggregator = self.strategy, self.aggregator()
        losses, weights, kept = list[float](), list[float](), dict[str, Tensor]()
        for reply in replies:
            with self.watch.part("aggregate"):
                for name, vector in strategy.averaged(reply).items():
                    aggregator.add(name, vector, strategy.weight_of(name, reply))
                kept |= strategy.kept(server_round, reply)
            losses.append(reply.number("loss"))
            weights.append(strategy.weights[reply.client])
        answered = len(losses)
        stop_if_too_many_failed(server_round, self.cohort.clients, self.clients.failures, self.config.limits)
        if answered >= self.config.limits.min_replies:
            if aggregator.counts and self.config.privacy.noise_multiplier > 0:
                self.clients.ledger.sums(server_round, release_of(self.config, strategy.drawn))
            with self.watch.part("aggregate"):
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
                    with self.watch.part("judge"):
                        self._judge.check(self.strategy.averaged(reply), self.strategy.vectors)
            except BadReply as error:
                self.clients.refuse(self._pending, given.client, error)
            else:
                yield reply
        self.clients.failures |= self._pending.failures  # before it is judged whether too many failed

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


def _judge(strategy: Strategy) -> Judge:
    return Judge.of(strategy.config, strategy.task, strategy.common, strategy.architectures)
