"""What makes a reply unusable, and a round worth stopping for."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedjets_flwr.config.schema import Limits
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.wire.messages import BadReply, Reply


def check_trained(reply: Reply, samples: int, state: Mapping[str, Tensor], limits: Limits) -> None:
    """Check a client's reply to a train message.

    Args:
        reply: numbers and vectors of the expected sizes.
        samples: what the client was prepared with.
        state: the vectors that it started from.
        limits: the norm bound.

    Raises:
        BadReply: the reason why it must not be used.
    """
    if reply.count("num-examples", limits.max_samples) != samples:
        raise BadReply(f"num-examples: not the {samples} that the client was prepared with")
    reply.number("loss")
    for name, vector in reply.vectors.items():
        if not all_finite(vector):
            raise BadReply(f"{name} is not finite")
        if limits.max_update_norm and name in state and float((vector - state[name]).norm()) > limits.max_update_norm:
            raise BadReply(f"the update of {name} is larger than limits.max-update-norm = {limits.max_update_norm:g}")


def stop_if_too_many_failed(
    server_round: int, cohort: Sequence[int], failures: Mapping[int, str], limits: Limits
) -> None:
    """End the run where a round lost more clients than it may; this also catches a simulation whose actors died.

    Raises:
        FedjetsError: names the round, the share and one client's reason.
    """
    failed = [client for client in cohort if client in failures]
    if len(failed) > limits.max_failure_share * len(cohort):
        raise FedjetsError(
            f"round {server_round}: {len(failed)} of {len(cohort)} clients failed, more than limits.max-failure-share ="
            f" {limits.max_failure_share:g}; client {failed[0]}: {failures[failed[0]]}"
        )


def read_experts(reply: Reply, count: int, num_experts: int) -> tuple[int, ...]:
    """Return the ids of a reply to ``query.route``, best first.

    Raises:
        BadReply: they are not ``count`` different ids of experts.
    """
    experts = reply.integers("experts", count)
    if len(set(experts)) != len(experts) or not all(0 <= m < num_experts for m in experts):
        raise BadReply(f"experts {experts}: not {count} different ids of experts")
    return tuple(experts)
