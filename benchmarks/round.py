"""Seconds of a round of the preset cifar10-laptop through Flower, against a bare PyTorch loop of the same training.

The bare loop trains the same list of (client, expert, batch) with the same optimiser in one process that has all cores:
no server, no routing, no averaging, no messages. It is tried with one torch thread on each of a pool of threads, and
with all cores in each operation; the faster counts. `head` is the preset: linear experts over cached features, whose
training takes hundredths of a second a round. `all` is the same with whole experts, where training dominates.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import BareLoop
from benchmarks.engine import ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, matmul_peak, ratios
from client_app.runtime import Runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.expert import build_configured_gate, build_expert, expert_architecture
from fedjets_flwr.moe.gating import anchor_gate_loss, chosen_weights, mixture_loss, scores
from fedjets_flwr.tasks import open_task

VARIANTS: dict[str, dict[str, Scalar]] = {
    "head": {},
    "all": {"moe.trainable": "all", "moe.init": "random", "train.lr": 0.05},
}
LIMITS = {"head": 1.1, "all": 1.1}


@dataclass
class Work:
    """What one client trains in a round: its data and the experts that it holds."""

    runtime: Runtime
    client: int
    experts: int
    anchor: bool


class Worker:
    """Models of one thread, made once and overwritten for each client."""

    def __init__(self, runtime: Runtime) -> None:
        c = runtime.config
        self.experts = [
            build_expert(c, runtime.common, runtime.architecture(0), 0, c.moe.init) for _ in range(c.moe.top_k)
        ]
        self.start = [[p.detach().clone() for p in expert.parameters()] for expert in self.experts]
        self.gate = build_configured_gate(c, runtime.common, c.moe.experts)
        self.gate_start = [p.detach().clone() for p in self.gate.parameters()]

    def train(self, work: Work) -> None:
        """Do one client's local epochs."""
        runtime, c = work.runtime, work.runtime.config
        local, experts = runtime.data(work.client), self.experts[: work.experts]
        for expert, start in zip(experts, self.start, strict=False):
            _load(expert, start)
        _load(self.gate, self.gate_start)
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=c.train.lr, momentum=c.train.momentum, foreach=True) for m in experts
        ]
        optimizers.append(torch.optim.SGD(self.gate.parameters(), lr=c.gate.lr, foreach=True))
        inputs = runtime.inputs(local)
        for model in [*experts, self.gate]:
            model.train()
        for rows in torch.randperm(len(local)).split(c.train.batch_size):
            loss = self._loss(c, experts, inputs(rows), local.embedding[rows], local.targets[rows], work.anchor)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    def _loss(
        self, c: Config, experts: list[nn.Sequential], x: Tensor, embedding: Tensor, labels: Tensor, anchor: bool
    ) -> Tensor:
        if anchor:
            return F.cross_entropy(experts[0](x), labels) + anchor_gate_loss(self.gate(embedding), 0)
        weights = chosen_weights(scores(self.gate(embedding)), list(range(len(experts))), c.moe.renormalise)
        return mixture_loss(torch.stack([expert(x) for expert in experts]), weights, labels, c.moe.mix or "logits", 0.0)


def measure(plan: Plan) -> Outcome:
    """Alternate blocks of engine rounds with the bare loop over the same jobs, for both variants."""
    outcome = Outcome("round", (__doc__ or "").strip())
    peak = matmul_peak()
    outcome.facts["matrix-product peak of all cores, GFLOP/s"] = round(peak / 1e9, 1)
    for name, changes in VARIANTS.items():
        measured, flops, mode = _variant(plan, name, dict(changes))
        engine, bare = measured
        outcome.samples[f"{name}: engine, s a round"] = Samples(tuple(engine))
        outcome.samples[f"{name}: bare loop, s a round"] = Samples(tuple(bare))
        over = [a - b for a, b in zip(engine, bare, strict=True)]
        outcome.samples[f"{name}: engine - bare loop, s"] = Samples(tuple(over))
        outcome.samples[f"{name}: share of the peak, engine"] = Samples(tuple(flops / s / peak for s in engine))
        outcome.samples[f"{name}: share of the peak, bare loop"] = Samples(tuple(flops / s / peak for s in bare))
        outcome.facts[f"{name}: GFLOP of training in a round"] = round(flops / 1e9, 2)
        outcome.facts[f"{name}: bare loop's faster setting"] = mode
        outcome.bounds.append(Bound(f"{name}: engine / bare loop", ratios(engine, bare), LIMITS[name]))
    return outcome


def _variant(plan: Plan, name: str, changes: dict[str, Scalar]) -> tuple[tuple[list[float], list[float]], int, str]:
    if plan.quick:
        changes |= {"partition.samples-per-client": 64, "partition.clients": 12}
    config = settings(plan, name, changes, "cifar10-laptop")
    torch.manual_seed(0)
    common = load_common_expert(Path(config.common_expert.path))
    runtime = Runtime(config, common, [expert_architecture(config, common, open_task(config).spec, config.moe.init)])
    block = 1 if plan.quick else {"head": 20, "all": 1}[name]
    with ExitStack() as stack:
        engine = stack.enter_context(ours(config, Resources()))
        engine.rounds(2 if plan.quick else 3, seconds=600)
        bare = BareLoop(lambda: Worker(runtime), Worker.train, lambda job: job.experts)
        bare.choose(_jobs(runtime, engine.records[-1]["cohort"]))
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(plan.rounds):
            seconds[0].append(sum(engine.rounds(block)) / block)
            cohorts = [record["cohort"] for record in engine.records[-block:]]
            seconds[1].append(sum(bare.round(_jobs(runtime, cohort)) for cohort in cohorts) / block)
        with FlopCounterMode(display=False) as counter:
            bare.alone(_jobs(runtime, cohorts[-1]))
    return seconds, int(counter.get_total_flops()), bare.mode


def _jobs(runtime: Runtime, cohort: list[int]) -> list[Work]:
    anchors = runtime.config.num_anchors
    for client in cohort:
        runtime.data(client)  # data are read before the clock runs
    return [Work(runtime, c, 1 if c < anchors else runtime.config.moe.top_k, c < anchors) for c in cohort]


@torch.no_grad()
def _load(model: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.copy_(value)
