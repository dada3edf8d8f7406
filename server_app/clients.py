"""The clients of a run, as its server knows them: who never trains, who answers; and asking them."""

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from fedjets_flwr.federation.aggregation import bounded_weights
from fedjets_flwr.federation.cohort import draw_participants
from fedjets_flwr.federation.privacy import Ledger
from fedjets_flwr.federation.reply_checks import OtherData, read_experts
from fedjets_flwr.names import UNSEEN, VALIDATION
from fedjets_flwr.wire.backoff import Backoff
from fedjets_flwr.wire.exchange import Exchange, PendingExchange
from fedjets_flwr.wire.messages import BadReply, Job, Reply
from server_app.preparation import Prepared, prepare
from server_app.stopwatch import Stopwatch
from strategies.base import Strategy

Answer = TypeVar("Answer")


class Clients:
    """Knows the clients, prepares those whose data is new, and asks them with a method's vectors.

    Attributes:
        strategy: the method, with the state.
        exchange: with the SuperNodes.
        prepared: what they told when they were.
        ledger: of what privacy counts.
        unseen: clients that never train and whose labels score the method.
        validation: clients that never train and by whose scores settings are chosen; where there are some, the unseen
            ones are scored once, after the last round.
        unlabelled: clients that never train and have no labels; experts are chosen for them all the same.
        participants: clients that train and are scored on a test part of their own.
        failures: of the current round, reasons by client id.
        changed: clients whose data is no longer what they were prepared with; the next round begins with that.
    """

    def __init__(self, strategy: Strategy, exchange: Exchange, prepared: Prepared, watch: Stopwatch) -> None:
        self.strategy, self.exchange, self.config = strategy, exchange, strategy.config
        self._watch, self.prepared = watch, Prepared(measured=prepared.measured)
        self.ledger = Ledger(self.config.run_dir)
        self.unseen: list[int] = []
        self.validation: list[int] = []
        self.unlabelled: list[int] = []
        self.take(prepared)
        scored = self.config.partition.test_share > 0 or not strategy.task.classifies
        self.participants = draw_participants(self.config) if scored else []
        self.failures: dict[int, str] = {}
        self.changed: set[int] = set()
        self._late: Backoff[int] = Backoff()

    # Who they are ----------------------------------------------------------------------------------------------------

    def take(self, prepared: Prepared) -> None:
        """Note what clients hold that were prepared, how much it counts, and who of them never trains."""
        strategy, training = self.strategy, self.config.partition.clients
        self.prepared.add(prepared)
        labelled = {UNSEEN: self.unseen, VALIDATION: self.validation}
        for client in sorted(client for client in prepared.num_samples if client >= training):
            for kind in (*labelled.values(), self.unlabelled):
                if client in kind:
                    kind.remove(client)
            known = client in prepared.right
            insort(labelled[self.config.partition.role_of(client)] if known else self.unlabelled, client)
        strategy.num_samples |= prepared.num_samples
        self.opt_out(prepared.opted_out)
        held = {client: count for client, count in strategy.num_samples.items() if client < training}
        strategy.weights = bounded_weights(held, self.config.aggregation.max_weight)

    def opt_out(self, ids: Iterable[int]) -> bool:
        """Note training clients that take no part; return whether one did until now."""
        new = {client for client in ids if client < self.config.partition.clients} - self.strategy.opted_out
        self.strategy.opted_out |= new
        return bool(new)

    def awake(self, ids: Iterable[int], server_round: int) -> list[int]:
        """Return whom of some clients a round may ask: others were late before, and rest."""
        return [client for client in ids if not self._late.resting(client, server_round)]

    def prepare(self, server_round: int, wanted: Iterable[int]) -> dict[int, str]:
        """Prepare those of a round's clients that could not be before, and all whose data changed; some may be late.

        Returns why clients could not be prepared.
        """
        unknown = {client for client in wanted if client not in self.strategy.num_samples}
        changed = set(self.awake(self.changed, server_round))
        self.changed -= changed
        if not (anew := sorted(unknown | changed)):
            return {}
        prepared = prepare(self.exchange, self.config, anew)
        self.take(prepared)
        for client in prepared.late:
            self._late.silent(client, server_round)
        return {client: f"could not be prepared: {why}" for client, why in prepared.failures.items()}

    # Asking them -----------------------------------------------------------------------------------------------------

    def request(self, kind: str, server_round: int, jobs: Sequence[Job], served: bool = False) -> PendingExchange:
        """Return an exchange of the method's vectors; ``served``: for predictions of the clients' own."""
        strategy = self.strategy  # all that the exchange keeps
        outgoing = strategy.outgoing(jobs)
        return self.exchange.request(
            kind, server_round, jobs, outgoing, lambda name: strategy.spec_of(name).size, served
        )

    def ask(
        self, kind: str, server_round: int, jobs: Sequence[Job], read: Callable[[Reply], Answer], served: bool = False
    ) -> dict[int, Answer]:
        """Return what clients answer, as ``read`` has it, by client id; who fails is missing."""
        with self._watch.part("select"):
            pending = self.request(kind, server_round, jobs, served)
            answers = self.read(pending, pending.replies(), read)
        self.note(server_round, pending)
        return answers

    def read(
        self, pending: PendingExchange, replies: Iterable[Reply], read: Callable[[Reply], Answer]
    ) -> dict[int, Answer]:
        """Return what replies say, as ``read`` has it, by client id; why others have no say stands in ``pending``."""
        answers = {}
        for reply in replies:
            try:
                answers[reply.client] = read(reply)
            except BadReply as error:
                self.refuse(pending, reply.client, error)
        return answers

    def route(self, server_round: int, ids: Sequence[int], served: bool = False) -> dict[int, tuple[int, ...]]:
        """Ask clients which experts the current gate picks for their data; a client that fails is left out."""
        if not ids:
            return {}
        jobs = [Job(client, ("gate",), cost=self.strategy.num_samples[client]) for client in ids]
        self.count_routes(server_round, ids)
        read = partial(read_experts, count=self.config.moe.top_k, num_experts=self.strategy.num_experts)
        return self.ask("query.route", server_round, jobs, read, served)

    def count_routes(self, server_round: int, ids: Sequence[int]) -> None:
        """Note what clients give away by their choice of experts, where that is private."""
        if (epsilon := self.config.privacy.route_epsilon) > 0:
            self.ledger.routes(server_round, ids, epsilon)

    def refuse(self, pending: PendingExchange, client: int, error: BadReply) -> None:
        """Note why a reply is not used, and who has other data by now."""
        pending.reject(client, str(error))
        if isinstance(error, OtherData):
            self.changed.add(client)

    def note(self, server_round: int, pending: PendingExchange) -> None:
        """Note who failed in an exchange; clients that did not answer in time are asked less often."""
        self.failures |= pending.failures
        for client in pending.jobs:
            if client in pending.late:
                self._late.silent(client, server_round)
            elif client not in pending.failures:
                self._late.answered(client)
