"""What makes a reply unusable, and a round worth stopping for."""

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from fedjets_flwr.config.sections import Limits
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite, grew
from fedjets_flwr.wire.messages import BadReply, Reply


class OtherData(BadReply):
    """A reply of a client that holds another number of samples than it was prepared with; it is prepared anew."""


def check_samples(reply: Reply, samples: int, most: int) -> None:
    """Check that a client worked on as many samples as it was prepared with, which is what its weight comes from.

    Raises:
        BadReply: it did not; :class:`OtherData`, if it says how many it has now.
    """
    if reply.count("num-examples", most) != samples:
        raise OtherData(f"num-examples: not the {samples} that the client was prepared with")


def check_trained(
    reply: Reply, samples: int, state: Mapping[str, Tensor], variances: Mapping[str, Tensor], limits: Limits
) -> None:
    """Check a client's reply to a train message.

    Args:
        reply: numbers and vectors of the expected sizes.
        samples: what the client was prepared with.
        state: the vectors that it started from.
        variances: positions of running variances in each vector that has some, (k,) int64.
        limits: bounds of norms.

    Raises:
        BadReply: the reason why it must not be used.
    """
    check_samples(reply, samples, limits.max_samples)
    reply.number("loss")
    for name, vector in reply.vectors.items():
        if not all_finite(vector):
            raise BadReply(f"{name} is not finite")
        if name in variances and float(vector[variances[name]].min()) < 0:
            raise BadReply(f"{name}: a running variance is negative")
        if limits.max_update_norm and name in state and float((vector - state[name]).norm()) > limits.max_update_norm:
            raise BadReply(f"the update of {name} is larger than limits.max-update-norm = {limits.max_update_norm:g}")
        if name in state and grew(vector, state[name], limits.max_growth):
            raise BadReply(f"{name} is over limits.max-growth = {limits.max_growth:g} times as long as it was")


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


def bounded_mean(losses: Sequence[float], weights: Sequence[float], times: float = 10.0) -> float:
    """Return the weighted mean of reported losses, each at most ``times`` their median in size; NaN of none.

    A loss is what a client says; an absurd one must not hide what the others report.
    """
    if not losses:
        return math.nan
    bound = times * abs(statistics.median(losses))
    bounded = [max(-bound, min(loss, bound)) for loss in losses]
    return sum(weight * loss for loss, weight in zip(bounded, weights, strict=True)) / sum(weights)


def read_experts(reply: Reply, count: int, num_experts: int) -> tuple[int, ...]:
    """Return the ids of a reply to ``query.route``, best first.

    Raises:
        BadReply: they are not ``count`` different ids of experts.
    """
    experts = reply.integers("experts", count)
    if len(set(experts)) != len(experts) or not all(0 <= m < num_experts for m in experts):
        raise BadReply(f"experts {experts}: not {count} different ids of experts")
    return tuple(experts)
