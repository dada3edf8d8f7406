"""Serving and scoring clients: those that never train, and those that train and hold test parts.

Every E rounds the clients that never train are served and scored; where some are for validation, those, and the unseen
ones once, after the last round. Clients that train adapt what they are served and are scored on tests of their own.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import median

from flwr.app import Message, MetricRecord

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.moe.metrics import READINGS, ClientResult, summarise
from fedjets_flwr.names import MICRO, USUAL, expert_ids, expert_name
from fedjets_flwr.runs.score import BITS_PER_BYTE, UNSEEN_ACCURACY, VALIDATION_ACCURACY, Score
from fedjets_flwr.wire.exchange import PendingExchange
from fedjets_flwr.wire.messages import Job, Reply
from server_app.answers import (
    of_inspection,
    of_own_tests,
    read_entropy,
    read_inspection,
    read_own_test,
    read_result,
)
from server_app.clients import Clients
from server_app.stopwatch import Stopwatch
from strategies.base import Routes

log = logging.getLogger("flwr")


class Scoring:
    """Serves a method's models and scores them; ``last`` says whether a round is the run's last one.

    Attributes:
        results: of the last evaluation, by client id.
        usual: how sure experts are of their anchors' samples, by expert; empty: no read-out asks, or nobody told.
        served: the vectors of each client in the last evaluation.
    """

    def __init__(self, clients: Clients, watch: Stopwatch) -> None:
        self.clients, self.strategy, self.config = clients, clients.strategy, clients.config
        self._watch = watch
        self.results: dict[int, ClientResult] = {}
        self.usual: dict[int, float] = {}
        self.served: dict[int, tuple[str, ...]] = {}
        self._summaries: dict[str, dict[str, object]] = {}
        self._pending: PendingExchange

    @property
    def score(self) -> Score:
        """What the run is judged by."""
        if not self.strategy.task.classifies:
            return BITS_PER_BYTE
        validated = self.config.partition.validation_clients and self.strategy.score is UNSEEN_ACCURACY
        return VALIDATION_ACCURACY if validated else self.strategy.score

    # Clients that never train ----------------------------------------------------------------------------------------

    def due(self, server_round: int, last: bool) -> bool:
        """Return whether a round scores clients that never train."""
        on_time = last or server_round % self.config.run.evaluate_every == 0
        return self.strategy.serves_unseen and self.strategy.task.classifies and on_time

    def scored(self, last: bool) -> list[int]:
        """Return the clients that never train which a round serves, if it evaluates."""
        clients = self.clients
        choosing = self.config.partition.validation_clients and not last  # even if none of them is here now
        return [*clients.validation, *([] if choosing else [*clients.unseen, *clients.unlabelled])]

    def asked(self, last: bool) -> list[int]:
        """Return the clients that a round asks if it evaluates, with the anchors that vouch for experts."""
        return [*self.scored(last), *(self.strategy.anchors if self.strategy.vouched else ())]

    def serve(self, server_round: int, last: bool, routes: Routes) -> list[Message]:
        """Return the evaluate messages to the clients that never train, by their routes where a gate routes."""
        strategy, scored = self.strategy, self.scored(last)
        self.served = strategy.serve(scored, routes)
        if strategy.vouched:
            self.vouch(server_round)
        jobs = [
            Job(c, self.served[c], numbers=self.usual_of(c), cost=strategy.num_samples[c])
            for c in scored
            if c in self.served and c not in self.clients.unlabelled
        ]
        self._pending = self.clients.request("evaluate", server_round, jobs)
        return self._pending.messages

    def vouch(self, server_round: int) -> None:
        """Ask every anchor how sure its expert is of its samples; of one that fails what it last told still counts."""
        strategy, classes = self.strategy, len(self.strategy.task.spec.classes)
        bound = dict(zip(strategy.anchors, range(strategy.num_experts), strict=False))
        present = [c for c in bound if c in strategy.num_samples and c not in strategy.opted_out]
        asked = self.clients.awake(present, server_round)
        jobs = [Job(c, (expert_name(bound[c]),), cost=strategy.num_samples[c]) for c in asked]
        answers = self.clients.ask(
            "query.vouch", server_round, jobs, partial(read_entropy, classes=classes), served=True
        )
        self.usual |= {bound[client]: nats for client, nats in answers.items()}

    def usual_of(self, client: int) -> dict[str, int]:
        """Return how sure an unseen client's first expert, and the common expert, usually are, as its job tells it.

        An expert of which nobody told stands in the middle of the others.
        """
        if not self.usual:
            return {}
        first = expert_ids(self.served[client])[0]
        expert = self.usual.get(first, median(self.usual.values()))
        told = zip(USUAL, (expert, self.strategy.common.usual_entropy), strict=True)
        return {name: round(nats * MICRO) for name, nats in told}

    def collect(self, server_round: int, last: bool, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep the counts of clients that never train in :attr:`results`; return the method's accuracy.

        Raises:
            FedjetsError: of simulated clients nobody answered, and nobody is prepared anew in a round to come.
        """
        strategy, clients, pending = self.strategy, self.clients, self._pending
        del self._pending  # what it holds of messages would stay until the next evaluation
        self.results = clients.read(pending, pending.read(replies), self._result)
        clients.failures |= pending.failures  # being late here is no reason to rest
        asked = set(self.scored(last)).difference(clients.unlabelled)
        again = not last and not clients.changed.isdisjoint(asked)
        if asked and not self.results and not again:
            known = (f"client {client}: {why}" for client, why in clients.failures.items() if client in asked)
            message = f"round {server_round}: no unseen client answered; {next(known, 'none was prepared')}"
            if clients.exchange.nodes.simulated:
                raise FedjetsError(message)
            log.warning("%s; this round is not evaluated", message)  # sites come and go; what was trained stays
        self._summaries, gated = {}, "gate" in strategy.vectors
        for kind, held in (("validation", clients.validation), ("evaluation", clients.unseen)):
            if answered := {client: self.results[client] for client in held if client in self.results}:
                self._summaries[kind] = summarise(answered, strategy.reading, strategy.num_experts, gated)
        accuracies = [summary["accuracy"] for summary in self._summaries.values()]
        return MetricRecord({"accuracy": accuracies[-1]}) if accuracies else None  # type: ignore[dict-item]

    def _result(self, reply: Reply) -> ClientResult:
        return read_result(
            reply,
            expert_ids(self.served[reply.client]),
            self.strategy.num_samples[reply.client],
            len(self.strategy.task.spec.columns),
            self.config.limits.max_samples,
            compared=bool(self.usual),
        )

    def record(self, server_round: int, last: bool) -> dict[str, object]:
        """Return what the round's record says of the evaluation; now and then every expert is looked at for it."""
        clients, found = self.clients, dict[str, object]()
        if self.usual:
            found["usual"] = dict(sorted(self.usual.items()))
        if clients.unlabelled:
            found["served"] = {c: list(expert_ids(n)) for c, n in self.served.items() if c in clients.unlabelled}
        if not self.results:
            return found
        found |= self._summaries
        every = self.config.run.inspect_every
        if last or (every and server_round % every == 0):
            with self._watch.part("inspect"):
                unseen = {client: result for client, result in self.results.items() if client in clients.unseen}
                found["inspection"] = self.inspect(server_round, unseen or self.results)
        return found

    def inspect(self, server_round: int, results: Mapping[int, ClientResult]) -> dict[str, object]:
        """Measure every expert on every class of clients that were scored; this traffic is no part of any method.

        Nor do simulated clients hold what it brought; a site does.
        """
        strategy, clients, exchange = self.strategy, self.clients, self.clients.exchange
        experts = tuple(map(expert_name, range(strategy.num_experts)))
        jobs = [Job(client, experts, cost=result.samples) for client, result in results.items()]
        before, held = exchange.traffic.copy(), exchange.held.held_by(results)
        pending = clients.request("query.inspect", server_round, jobs)
        answers = clients.read(
            pending, pending.replies(), lambda reply: read_inspection(reply, results[reply.client], len(experts))
        )
        exchange.traffic = before
        if strategy.task.simulates:
            exchange.held.restore({c: versions for c, versions in held.items() if c not in pending.failures})
        clients.failures |= pending.failures
        return of_inspection(answers, results, len(experts))

    # Clients that train ----------------------------------------------------------------------------------------------

    def own_tests(self, server_round: int, last: bool) -> dict[str, object]:
        """Score the clients that train on their own test parts and return what the round's record says of it.

        Raises:
            FedjetsError: after the last round, nobody could be scored.
        """
        strategy, clients = self.strategy, self.clients
        apart = set(clients.participants) & strategy.opted_out if strategy.routed else set()
        known = (strategy.num_samples.keys() | strategy.opted_out) - apart
        present = [client for client in clients.participants if client in known]
        with self._watch.part("participants"):
            routes = clients.route(server_round, present, served=True) if strategy.routed else {}
            served = strategy.personal(present, routes)
            tuned = self.config.participants.tuned and last
            numbers = {"reading": READINGS.index(strategy.reading)} | ({"tuned": 1} if tuned else {})
            jobs = [Job(c, names, (), numbers, strategy.num_samples.get(c, 1)) for c, names in served.items()]
            pending = clients.request(f"evaluate.{strategy.algorithm}", server_round, jobs, served=True)
            answers = clients.read(pending, pending.replies(), partial(read_own_test, strategy=strategy, tuned=tuned))
        lost = set(clients.participants) - set(present) - apart
        unsaid = sorted(lost - clients.failures.keys())  # of some it is known why
        clients.failures |= pending.failures | dict.fromkeys(unsaid, "could not be prepared")
        for client in set(present) - served.keys() - clients.failures.keys():
            why = "it opted out" if client in strategy.opted_out else "it did not answer"
            clients.failures[client] = f"{why}: which experts suit it is not known"
        clients.failures |= dict.fromkeys(sorted(apart), "it opted out: the gate is not asked for its experts")
        if pending.failures and not answers and last:
            reason = next(iter(pending.failures.values()))
            raise FedjetsError(
                f"round {server_round}: no client could be scored on its own test part; one says: {reason}"
            )
        return {"participants": of_own_tests(answers, strategy.task.spec.kinds)} if answers else {}
