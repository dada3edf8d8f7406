"""Moving experts of ResNet-34 size: 5 anchors and 5 normal clients with K = 2, 15 models down and 15 up a round.

`shared` and `inline` stand against a stock Flower app (FedAvg, state dicts) that moves the same 15 models each way to
15 nodes, and against a plain copy of the same bytes by all cores between two pieces of memory that already exist.
Every client loads what it gets into its model, changes one number and sends it back: no gradient is computed on either
side. The time to average is part of neither side (`aggregate` measures it); the engine's waiting is.
"""

import time
from contextlib import ExitStack

import torch

from benchmarks.engine import RIVALS, Engine, ours, stock
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores, ratios
from fedjets_flwr.config import Scalar
from fedjets_flwr.launcher import Resources

MODELS = 15
EXTRA = {"strategies/touch.py": RIVALS / "touch_method.py", "client_app/local/touch.py": RIVALS / "touch_local.py"}


def measure(plan: Plan) -> Outcome:
    """Time blocks of two rounds of each side in turn."""
    block, size = (1, 11_000_000) if plan.quick else (2, 21_300_000)
    sides: dict[str, Engine] = {}
    with ExitStack() as stack:
        for name in ("shared", "inline"):
            changes: dict[str, Scalar] = {"strategy.name": "touch", "transport.name": name, "model.stem": "imagenet"}
            changes |= {"model.name": "resnet18" if plan.quick else "resnet34", "partition.samples-per-client": 8}
            config = settings(plan, name, changes)
            sides[name] = stack.enter_context(ours(config, Resources(), EXTRA))
            sides[name].rounds(2)
        task = "move-quick" if plan.quick else "move"
        given: dict[str, Scalar] = {"task": task, "nodes": MODELS, "fraction": 1.0, "threads": 1}
        sides["stock Flower"] = stack.enter_context(stock(plan.scratch / "stock", given, Resources(MODELS)))
        sides["stock Flower"].rounds(2)
        source, target = torch.rand(size), torch.rand(size)
        totals: dict[str, list[float]] = {name: [] for name in [*sides, "memory copy"]}
        averaging: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(plan.rounds):
            for name, engine in sides.items():
                seconds = sum(engine.rounds(block)) / block
                records = engine.records[-block:]
                average = sum(_averaging(record) for record in records) / block
                totals[name].append(seconds - average)
                averaging[name].append(average)
            totals["memory copy"].append(_copy(source, target))
    outcome = Outcome("transport", (__doc__ or "").strip())
    outcome.bounds = [
        Bound("shared / stock Flower", ratios(totals["shared"], totals["stock Flower"]), 0.20),
        Bound("inline / stock Flower", ratios(totals["inline"], totals["stock Flower"]), 0.80),
        Bound("shared / memory copy", ratios(totals["shared"], totals["memory copy"]), 3.0),
    ]
    outcome.samples = {f"{name}, s a round": Samples(tuple(v)) for name, v in totals.items()}
    outcome.samples |= {f"{name}, averaging (not in it), s": Samples(tuple(v)) for name, v in averaging.items()}
    outcome.facts = {"models each way": MODELS, "MB of a model": round(4 * size / 1e6, 1)}
    return outcome


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
