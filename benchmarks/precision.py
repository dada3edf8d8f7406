"""Seconds of a round of the preset domains-laptop with ten clients in bfloat16, against the same round in float32.

Whole experts, through Flower; both runs are under way and do a round in turn.
"""

from contextlib import ExitStack

from benchmarks.engine import ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.launch.simulation import Resources

LIMIT = 0.8
"""A precision that is not at least 1.25 times as fast is not worth its rounding."""


def measure(plan: Plan) -> Outcome:
    """Alternate rounds of two runs that differ in ``train.precision`` alone."""
    outcome = Outcome("precision", (__doc__ or "").strip())
    size: dict[str, Scalar] = {"cohort.normals": 5}
    if plan.quick:
        size |= {"partition.samples-per-client": 64, "partition.clients": 12}
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    with ExitStack() as stack:
        runs = {
            name: stack.enter_context(
                ours(settings(plan, name, {**size, "train.precision": name}, "domains-laptop"), Resources())
            )
            for name in seconds
        }
        for engine in runs.values():
            engine.rounds(1, seconds=600)
        for _ in range(plan.rounds):
            for name, engine in runs.items():
                seconds[name].append(sum(engine.rounds(1)))
    for name, measured in seconds.items():
        outcome.samples[f"{name}, s a round"] = Samples(tuple(measured))
    outcome.bounds.append(
        Bound("a whole-expert round, bfloat16 / float32", ratios(seconds["bfloat16"], seconds["float32"]), LIMIT)
    )
    return outcome
