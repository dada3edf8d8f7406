"""What makes a reply unusable, and a round worth stopping for."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedjets_flwr.config.schema import Limits
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.wire.messages import Answer, BadReply


def check_trained(answer: Answer, samples: int, state: Mapping[str, Tensor], limits: Limits) -> None:
    """Check a client's answer to a train message.

    Args:
        answer: numbers and vectors of the expected sizes.
        samples: what the client was prepared with.
        state: the vectors that it started from.
        limits: the norm bound.

    Raises:
        BadReply: the reason why it must not be used.
    """
    if answer.count("num-examples", limits.max_samples) != samples:
        raise BadReply(f"num-examples: not the {samples} that the client was prepared with")
    answer.number("loss")
    for name, vector in answer.vectors.items():
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
