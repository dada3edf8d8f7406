"""Memory of a FedMoE client that holds half the experts against one that holds all, measured beside what is computed.

The model of `fedmoe-laptop`, as it is and with experts of eight times the units, is trained by the client's own loop on
tokens that are drawn. Tensors: the most bytes that torch's allocator held, by its profiler. Resident: the peak of a
process of its own beyond what it took before, once a tiny model was trained. Computed: weights, gradients and the
optimizer's moments alone (`memory_mean` of a run); what both have besides are a batch's activations.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from benchmarks.paced import memory
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sources import read_preset
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.transformer import LanguageArchitecture, sizes_of
from fedjets_flwr.moe.local_training import Adam, batches, fit
from fedjets_flwr.tasks.language_modelling import LanguageModelling

VOCABULARY = 2048
WIDER = 8
STEPS = 3
KEPT_BY_ADAM = 4
"""Floats for each weight: itself, its gradient, two moments."""


def measure(plan: Plan) -> Outcome:
    """Measure in turn with all experts and with half of them."""
    outcome, all_experts = Outcome("held", (__doc__ or "").strip()), architecture(1).experts
    parts = {"all": all_experts, "half": all_experts // 2}
    limits = {1: 0.95, WIDER: 0.7}
    for times, name in {1: "fedmoe-laptop", WIDER: "wider experts"}.items():
        found: dict[str, dict[str, list[float]]] = {
            "tensors": {part: [tensors(times, experts, plan.scratch)] for part, experts in parts.items()},
            "resident": {part: [] for part in parts},
            "computed": {part: [computed(times, experts)] for part, experts in parts.items()},
        }
        for _ in range(plan.rounds):
            for part, experts in parts.items():
                found["resident"][part].append(_in_a_process(times, experts))
        outcome.bounds.append(
            Bound(
                f"{name}, tensors, half / all", ratios(*(found["tensors"][p] for p in ("half", "all"))), limits[times]
            )
        )
        for kind, of in found.items():
            outcome.samples |= {f"{name}, {kind}, {part}, MB": Samples(tuple(values)) for part, values in of.items()}
            outcome.samples[f"{name}, {kind}, half / all"] = ratios(of["half"], of["all"])
    return outcome


def architecture(times: int) -> LanguageArchitecture:
    """Return the model of the preset, its experts so many times as wide."""
    m = Config.from_flat(read_preset("fedmoe-laptop")).language_model
    sizes = (VOCABULARY, m.context, m.width, m.heads, m.layers, m.switch_layers, m.experts, m.hidden * times)
    return LanguageArchitecture(*sizes, balance=m.balance)


def computed(times: int, experts: int) -> float:
    """Return the MB that training keeps of a model with so many experts in each layer."""
    whole = architecture(times)
    return 4 * KEPT_BY_ADAM * sizes_of(whole).of(whole.switch_layers * experts) / 2**20


def tensors(times: int, experts: int, scratch: Path) -> float:
    """Return the MB of all tensors at their peak in training with so many experts in a layer."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        train(_holding(times, experts))
    found.export_chrome_trace(str(scratch / "trace.json"))
    events = json.loads((scratch / "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]") / 2**20


def resident(times: int, experts: int) -> float:
    """Return the MB of this process at its peak, beyond those before, in training with so many experts in a layer."""
    torch.set_num_threads(1)
    train(replace(architecture(times), vocabulary=64, hidden=8, width=8))
    before = memory(os.getpid(), "VmRSS")
    train(_holding(times, experts))
    return memory(os.getpid(), "VmHWM") - before


def _holding(times: int, experts: int) -> LanguageArchitecture:
    whole = architecture(times)
    return replace(whole, held=(tuple(range(experts)),) * whole.switch_layers)


def train(kind: LanguageArchitecture) -> None:
    """Make a model and train it for some steps: from the second on all is there."""
    config = Config.from_flat(read_preset("fedmoe-laptop"))
    task, size, draw = LanguageModelling(config), config.train.batch_size, torch.Generator().manual_seed(1)
    tokens = torch.randint(kind.vocabulary, (STEPS * size, kind.context + 1), generator=draw)
    model = FlatModel(build(kind, 0))

    def losses_of(rows: Tensor) -> list[Tensor]:
        return [task.loss(model.module(tokens[rows, :-1]), tokens[rows, 1:])]

    fit([model], [Adam(model, config.train.lr)], batches(len(tokens), size, 1, draw), losses_of)


def _in_a_process(times: int, experts: int) -> float:
    code = f"from benchmarks.held import resident; print(resident({times}, {experts}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)
