"""The server's audit log: what clients were asked, by which key they answered, what came of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.runs.audit import AUDIT_LOG, append
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.wire.exchange import PendingExchange

TOLD = ("round", "cohort", "failures", "resting", "left", "refused_nodes")
"""What a round's line repeats of its record."""


class Audit(Callback):
    """Writes ``audit.jsonl`` of a run's folder; resumes, and runs that start afresh there, go on with it."""

    def __init__(self, config: Config, common: str) -> None:
        """Note that a run starts; ``common`` is the digest of its common expert."""
        self._path, self._every = config.run_dir / AUDIT_LOG, config.run.checkpoint_every
        facts = {"settings": config.identity(), "common_expert": common, "resumed": config.run.resume}
        append(self._path, "start", {"strategy": config.strategy.name} | facts, durable=True)

    def on_exchange(self, pending: PendingExchange) -> None:
        """Note an exchange whose replies were all read."""
        keys = pending.exchange.nodes.keys
        asked = {
            str(job.client): {
                "key": keys.get(message.metadata.dst_node_id, ""),
                "vectors": list(pending.jobs[job.client].vectors),  # of those it chose from, what it chose
            }
            for message, share in pending.shares
            for job in share
        }
        failed = {str(client): reason for client, reason in sorted(pending.failures.items())}
        answered = [client for client in sorted(pending.jobs) if client not in pending.failures]
        facts = {"round": pending.server_round, "asked": asked, "answered": answered, "failed": failed}
        append(self._path, "exchange", {"kind": pending.kind} | facts)

    def on_round(self, record: Mapping[str, Any], vectors: Mapping[str, Tensor]) -> None:
        """Note a round; where a checkpoint is due, all up to it is on the disk."""
        facts = {name: record[name] for name in TOLD if name in record}
        append(self._path, "round", facts, durable=record["round"] % self._every == 0)

    def on_broken_off(self, server_round: int, vectors: Mapping[str, Tensor]) -> None:
        """Note that the run ends early."""
        append(self._path, "broken off", {"round": server_round}, durable=True)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Note the run's end and the hash of its weights."""
        append(self._path, "end", {"rounds": summary["rounds"], "weights_hash": summary["weights_hash"]}, durable=True)
