"""Moving experts of ResNet-34 size: 5 anchors and 5 normal clients with K = 2, 15 models down and 15 up a round.

`shared` and `inline` stand against a stock Flower app (FedAvg, state dicts) that moves the same 15 models each way to
15 nodes, and against a plain copy of the same bytes by all cores between two pieces of memory that already exist.
Every client loads what it gets into its model, changes one number and sends it back: no gradient is computed on either
side. The stock app runs as Flower's own commands start it, ours with the huge pages that `fedjets run` asks for. The
time to average is part of neither side (`aggregate` measures it); the engine's waiting is.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.engine import RIVALS, Engine, ours, stock
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores, ratios
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.simulation import Resources

MODELS = 15
EXTRA = {"strategies/touch.py": RIVALS / "touch_method.py", "client_app/algorithms/touch.py": RIVALS / "touch_local.py"}


def measure(plan: Plan) -> Outcome:
    """Time blocks of each side in turn, `shared` with both sides up at once, `inline` with each started anew."""
    os.environ.setdefault("RAY_memory_usage_threshold", "0.99")  # beyond its 0.95 Ray kills actors
    outcome = Outcome("transport", (__doc__ or "").strip())
    floats = 11_000_000 if plan.quick else 21_300_000
    source, target = torch.rand(floats), torch.rand(floats)
    outcome.facts = {"models each way": MODELS, "MB of a model": round(4 * floats / 1e6, 1)}
    copies, shared = [], []
    for turn in _paused(plan, {"shared": _ours(plan, "shared"), "stock Flower": _stock(plan)}):
        shared.append(turn)
        copies.append(_copy(source, target))
    outcome.bounds = [
        Bound("shared / stock Flower", _add(outcome, "shared", shared), 0.20),
        Bound("shared / memory copy", ratios([turn["shared"][0] for turn in shared], copies), 3.0),
    ]
    outcome.samples["memory copy, s"] = Samples(tuple(copies))
    inline = [
        # At once they would need more than 24 GB.
        {name: next(_paused(plan, {name: side}))[name] for name, side in _inline_sides(plan).items()}
        for _ in range(1 if plan.quick else 3)
    ]
    outcome.bounds.insert(1, Bound("inline / stock Flower", _add(outcome, "inline", inline), 0.80))
    return outcome


Turn = dict[str, tuple[float, float]]
"""Seconds of a round without averaging, and of averaging, by the side's name."""


def _paused(plan: Plan, sides: dict[str, AbstractContextManager[Engine]]) -> Iterator[Turn]:
    """Start all sides and let one at a time go on for a block of rounds."""
    block = 1 if plan.quick else 3
    with ExitStack() as stack:
        engines = {name: stack.enter_context(side) for name, side in sides.items()}
        for engine in engines.values():
            engine.rounds(2)
        for _ in range(plan.rounds):
            turn = {}
            for name, engine in engines.items():
                seconds = sum(engine.rounds(block)) / block
                average = sum(map(_averaging, engine.records[-block:])) / block
                turn[name] = seconds - average, average
            yield turn


def _add(outcome: Outcome, name: str, turns: list[Turn]) -> Samples:
    """Add both sides' seconds to the outcome; return their ratios."""
    for side in turns[0]:
        label = side if side == name else f"{side} (beside {name})"
        moving, averaging = zip(*(turn[side] for turn in turns), strict=True)
        outcome.samples[f"{label}, s a round"] = Samples(moving)
        outcome.samples[f"{label}, averaging (not in it), s"] = Samples(averaging)
    ours, theirs = ([turn[side][0] for turn in turns] for side in turns[0])
    return ratios(ours, theirs)


def _inline_sides(plan: Plan) -> dict[str, AbstractContextManager[Engine]]:
    again = replace(plan, scratch=Path(tempfile.mkdtemp(dir=plan.scratch)))
    return {"inline": _ours(again, "inline"), "stock Flower": _stock(again)}


def _ours(plan: Plan, transport: str) -> AbstractContextManager[Engine]:
    changes: dict[str, Scalar] = {"strategy.name": "touch", "transport.name": transport, "model.stem": "imagenet"}
    changes |= {"model.name": "resnet18" if plan.quick else "resnet34", "partition.samples-per-client": 8}
    return ours(settings(plan, transport, changes), Resources(), EXTRA)


def _stock(plan: Plan) -> AbstractContextManager[Engine]:
    task = "move-quick" if plan.quick else "move"
    given: dict[str, Scalar] = {"task": task, "nodes": MODELS, "fraction": 1.0, "threads": 1}
    return stock(plan.scratch / "stock", given, Resources(MODELS))


def _averaging(record: dict[str, object]) -> float:
    """Return the seconds that a round's record gives to averaging."""
    seconds = record.get("seconds")
    return float(seconds["aggregate"]) if isinstance(seconds, dict) else float(str(record["aggregate"]))


def _copy(source: torch.Tensor, target: torch.Tensor) -> float:
    torch.set_num_threads(cores())
    begun = time.perf_counter()
    for _ in range(2 * MODELS):
        target.copy_(source)
    return time.perf_counter() - begun
