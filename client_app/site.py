"""What a deployed site puts between a message and its handler: its policy and its audit log."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import Context, Message
from torch import Tensor

from client_app.client import ClientContext, Update, Work
from client_app.local_privacy import with_noise
from client_app.node import Node
from client_app.policy import Asked, Policy, Refused, check_asked, check_leaving, policy_of
from fedjets_flwr.config.schema import Config
from fedjets_flwr.runs.audit import AUDIT_LOG, append
from fedjets_flwr.wire.messages import Head, Reply, bytes_of, decode_head

Note = Callable[[str, Mapping[str, object]], None]
"""Notes what happened, and facts about it."""


def unheard(what: str, facts: Mapping[str, object]) -> None:
    """Note nothing, as in a simulation."""


@dataclass(frozen=True)
class Site:
    """What counts for one message; of a simulation, nothing.

    Attributes:
        policy: what may be asked and told.
        note: writes to the audit log.
    """

    policy: Policy = Policy()
    note: Note = unheard

    def within(self, kind: str, work: Work) -> Work:
        """Return work whose outcome leaves only as the policy allows."""

        def allowed(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
            update = work(context, vectors)
            check_leaving(self.policy, kind, update)
            if self.policy.noise is None or not update.vectors:
                return update
            private, spent = with_noise(self.policy.noise, context, vectors, update)
            self.note("noise", {"client": context.client, **asdict(spent)})
            return private

        return allowed

    def noted(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """Return replies, each of which is noted before it leaves."""
        return replies if self.note is unheard else map(self._noted, replies)

    def _noted(self, reply: Reply) -> Reply:
        self.note("failed" if reply.error else "answered", _told(reply))
        return reply


def open_site(message: Message, context: Context, config: Config, node: Node) -> Site:
    """Return what counts for a message to a deployed site, which is noted.

    One whose client opted out answers for its own predictions alone.

    Raises:
        Refused: the site does not answer it.
        FedjetsError: the policy cannot be read.
    """
    policy, head, kind = policy_of(context.node_config), decode_head(message.content), message.metadata.message_type
    path = Path(str(context.node_config.get("audit-log") or config.cache_dir / AUDIT_LOG)).expanduser()
    where = {"run": str(context.run_id), "node": str(context.node_id), "kind": kind, "round": head.server_round}

    def note(what: str, facts: Mapping[str, object]) -> None:
        append(path, what, {**where, **facts}, durable=True)

    received = bytes_of(message.content)
    note("asked", _asked(head, Config.from_flat(context.run_config)) | {"bytes": received})
    try:
        if node.opted_out and not kind.startswith("evaluate."):
            raise Refused("opt-out = true: it takes part in no round")
        if strangers := sorted({job.client for job in head.jobs} - {node.client}):
            raise Refused(f"client {strangers[0]} is asked for, and client {node.client} is here")
        check_asked(policy, config, Asked(kind, head.jobs, received))
    except Refused as refusal:
        note("refused", {"reason": str(refusal)})
        raise
    return Site(policy, note)


def _asked(head: Head, config: Config) -> dict[str, object]:
    """Return who is asked for what; the settings are the run's, as the server has them."""
    clients = {str(job.client): list(job.vectors) for job in head.jobs}
    facts = {"settings": config.identity(), "strategy": config.strategy.name}
    return facts | {"common_expert": head.facts.get("common-expert", ""), "clients": clients}


def _told(reply: Reply) -> dict[str, object]:
    """Return who told what: names, and digests of the vectors as float32."""
    digests = {n: hashlib.sha256(v.detach().cpu().numpy().tobytes()).hexdigest() for n, v in reply.vectors.items()}
    facts = {"client": reply.client, "vectors": digests, "numbers": sorted(reply.numbers)}
    return facts | ({"reason": reply.error[:500]} if reply.error else {})
