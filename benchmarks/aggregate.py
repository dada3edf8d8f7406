"""Averaging 15 vectors of ResNet-34 size to 5 experts of 3 clients each: ours, Flower's, and the cheapest possible sum.

Ours gets flat vectors as they come off the wire and, as in a run, the memory of means that nobody reads any more;
Flower's gets the records that its clients send (one array per tensor of the state dict), each already in memory. Peak
memory is that of a process of its own, without such means and on one torch thread.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from torch import Tensor

from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores, ratios
from benchmarks.paced import memory
from fedjets_flwr.federation.aggregation import RunningMeans
from fedjets_flwr.models.architectures import Architecture, build

CLIENTS, EXPERTS = 15, 5
WEIGHT = 500


def measure(plan: Plan) -> Outcome:
    """Time the three side by side, and ours again in a process of its own for its memory."""
    torch.set_num_threads(cores())
    state, size = _state(plan.quick)
    vectors = [torch.rand(size) for _ in range(CLIENTS)]
    replies = _replies(state)
    totals = torch.zeros(EXPERTS, size)
    means: dict[str, Tensor] = {}

    def ours() -> None:
        means.update(mean(vectors, means))

    sides: dict[str, Callable[[], object]] = {
        "ours": ours,
        "flwr aggregate_arrayrecords": lambda: [
            aggregate_arrayrecords(replies[m::EXPERTS], "num-examples") for m in range(EXPERTS)
        ],
        "torch axpy": lambda: axpy(totals, vectors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(plan.rounds + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    extra = [_extra_memory(size) for _ in range(plan.rounds)]
    outcome = Outcome("aggregate", (__doc__ or "").strip())
    outcome.bounds = [
        Bound("seconds, ours / flwr", ratios(seconds["ours"], seconds["flwr aggregate_arrayrecords"]), 0.20),
        Bound("peak memory beyond the new experts, vectors", Samples(tuple(extra)), 1.0),
    ]
    outcome.samples = {f"{name}, s": Samples(tuple(values)) for name, values in seconds.items()}
    outcome.samples["ours / torch axpy"] = ratios(seconds["ours"], seconds["torch axpy"])
    outcome.facts = {"floats of an expert": size, "arrays of its state dict": len(state), "replies": CLIENTS}
    return outcome


def mean(vectors: list[Tensor], spare: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return what the server makes of a round: every expert the mean of its share of the vectors, in spare memory."""
    means = RunningMeans(spare)
    for client, vector in enumerate(vectors):
        means.add(f"expert.{client % EXPERTS}", vector, WEIGHT)
    return means.result()


def axpy(totals: Tensor, vectors: list[Tensor]) -> None:
    """Sum into memory that is already there."""
    totals.zero_()
    for client, vector in enumerate(vectors):
        totals[client % EXPERTS].add_(vector, alpha=EXPERTS / CLIENTS)


def peak(size: int) -> float:
    """Return the vectors' worth of memory that :func:`mean` needs at its peak beyond its inputs and its result."""
    vectors = [torch.rand(size) for _ in range(CLIENTS)]
    mean([vector[:1000] for vector in vectors])
    before = memory(os.getpid(), "VmRSS")
    result = mean(vectors)
    return (memory(os.getpid(), "VmHWM") - before) * 2**20 / (4 * size) - len(result)


def _extra_memory(size: int) -> float:
    code = f"from benchmarks.aggregate import peak; print(peak({size}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return max(0.0, float(done.stdout))


def _state(quick: bool) -> tuple[dict[str, Tensor], int]:
    name = "resnet8" if quick else "resnet34"
    model = build(Architecture(name, 8, "batch", "imagenet", 3, 10), 0)
    state = dict(model.state_dict())
    return state, sum(t.numel() for t in state.values() if t.is_floating_point())


def _replies(state: dict[str, Tensor]) -> list[RecordDict]:
    def record() -> RecordDict:
        arrays = {name: Array(tensor.numpy()) for name, tensor in state.items()}
        return RecordDict(
            {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": WEIGHT}), "config": ConfigRecord()}
        )

    return [record() for _ in range(CLIENTS)]
