"""Seconds of a round of the preset domains-laptop with ten clients in bfloat16, against the same round in float32.

Whole experts, through Flower; both runs are under way and do a round in turn. A CPU that only imitates bfloat16 is not
judged, and measured once.
"""

from contextlib import ExitStack

from benchmarks.engine import ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.models.device import has_bfloat16

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
        for _ in range(plan.rounds if has_bfloat16() else 1):
            for name, engine in runs.items():
                seconds[name].append(sum(engine.rounds(1, seconds=600)))
    for name, measured in seconds.items():
        outcome.samples[f"{name}, s a round"] = Samples(tuple(measured))
    name, ratio = "a whole-expert round, bfloat16 / float32", ratios(seconds["bfloat16"], seconds["float32"])
    if has_bfloat16():
        outcome.bounds.append(Bound(name, ratio, LIMIT))
    else:
        outcome.samples[f"{name}, on a CPU that imitates bfloat16"] = ratio
    return outcome
