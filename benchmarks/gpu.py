"""What one GPU gives: agreement with the CPU, samples a second, clients at once, the way of a vector, hours of presets.

    python -m benchmarks.gpu

Minutes; CIFAR-10 where ``data.dir`` (``FEDJETS_DATA``) has it, for the clients at once. Without a GPU one line and exit
code 2; ``--quick`` shows on a CPU that it works.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import write
from benchmarks.engine import ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples
from client_app.algorithms import fedjets
from client_app.client import ClientContext
from client_app.runtime import Runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sources import preset_names, read_preset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.expert import build_configured_gate, build_expert, expert_architecture
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import Sgd, fit
from fedjets_flwr.names import expert_name
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.messages import Job

NO_GPU = 2
IMAGES = 50_000
"""In CIFAR's train split, which a preset without samples-per-client deals out once."""


def agreement(plan: Plan, device: str) -> float:
    """Return how far one client's round on the device is from the CPU's: 1 - cosine of the two updates."""
    updates = []
    for where in ("cpu", device):
        config = settings(plan, f"agreement-{where}", {"moe.trainable": "all", "run.device": where})
        common = load_common_expert(Path(config.common_expert.path))
        architecture = expert_architecture(config, common, open_task(config).spec, config.moe.init)
        runtime = Runtime(config, common, [architecture])
        names = (*map(expert_name, range(config.moe.top_k)), "gate")
        models = [build_expert(config, common, architecture, m, "random") for m in range(config.moe.top_k)]
        gate = build_configured_gate(config, common, config.moe.experts)
        start = {name: FlatModel(model).vector.clone() for name, model in zip(names, (*models, gate), strict=True)}
        client = config.num_anchors
        context = ClientContext(runtime, Job(client, names, names), 1, runtime.data(client))
        trained = fedjets.train(context, {name: vector.to(runtime.device) for name, vector in start.items()}).vectors
        updates.append(torch.cat([trained[name].cpu() - start[name] for name in names]))
    return 1 - float(F.cosine_similarity(updates[0].double(), updates[1].double(), dim=0))


def training(architecture: Architecture, batch: int, device: torch.device, precision: str) -> Callable[[], int]:
    """Return what trains a model on a batch and returns how many samples that were."""
    model = FlatModel(build(architecture, 0).to(device))
    images = torch.randn(batch, architecture.channels, 32, 32, device=device)
    labels, rows = torch.arange(batch, device=device) % architecture.num_classes, torch.arange(batch)

    def losses_of(_: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model.module(images)
        return [F.cross_entropy(outputs.float(), labels)]

    def step() -> int:
        fit([model], [Sgd(model, 0.01, 0.9)], iter([rows]), losses_of)
        return batch

    return step


def rates(work: Callable[[], int], device: torch.device, seconds: float) -> list[float]:
    """Return five measurements of units a second, after a warm-up."""
    for _ in range(2):
        work()
    found = []
    for _ in range(5):
        done, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds / 5:
            done += work()
            _wait(device)
        found.append(done / (time.perf_counter() - begun))
    return found


def peak(device: torch.device, precision: str, size: int, seconds: float) -> float:
    """Return the matrix-product rate of a device, in FLOP/s; products may be as inexact as convolutions may."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def product() -> int:
        torch.mm(a, b)
        return 2 * size**3

    return max(rates(product, device, seconds))


def hours(config: Config, samples_a_second: float) -> float:
    """Return the hours of training of a whole run of a preset, one client after another."""
    part, cohort = config.partition, config.cohort
    samples = part.samples_per_client or IMAGES // part.clients
    visits = cohort.anchors + cohort.normals * config.moe.top_k
    return config.run.rounds * visits * samples * config.train.local_epochs / samples_a_second / 3600


def at_once(plan: Plan, share: str) -> list[float]:
    """Return seconds of rounds of whole ResNet-8s of domains-laptop with a share of the GPU for each client."""
    config = settings(plan, f"share-{share}", {"run.device": "cuda"}, "domains-laptop")
    with ours(config, Resources(gpus=share)) as engine:
        engine.rounds(2, seconds=300)
        return engine.rounds(plan.rounds)


def measure(plan: Plan, device: torch.device) -> Outcome:
    """Return all figures."""
    outcome = Outcome("gpu", (__doc__ or "").split("\n")[0])
    seconds, size = (0.2, 256) if plan.quick else (5.0, 8192)
    outcome.facts["device"] = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    difference = agreement(plan, device.type)
    outcome.bounds.append(Bound("1 - cosine of a client's update to the CPU's", Samples((difference,)), 1e-3))
    paper = _paper()
    architecture = replace(_architecture(paper), **({"name": "resnet8", "width": 4} if plan.quick else {}))
    batch = 8 if plan.quick else paper.train.batch_size
    for precision in ("float32", "bfloat16"):
        step = training(architecture, batch, device, precision)
        with FlopCounterMode(display=False) as counter:
            step()
        rate, most = rates(step, device, seconds), peak(device, precision, size, seconds)
        share = [samples * counter.get_total_flops() / batch / most for samples in rate]
        outcome.samples[f"{architecture.name}, batch {batch}, {precision}: samples a second"] = Samples(tuple(rate))
        outcome.samples[f"{precision}: share of the matrix-product peak"] = Samples(tuple(share))
        if architecture.name == paper.model.name:
            for name, config in _presets_of(paper.model.name):
                time_needed = hours(config, Samples(tuple(rate)).median)
                outcome.facts[f"{precision}: hours of training of {name}, one client at a time"] = round(time_needed, 1)
    vector = torch.zeros(sum(p.numel() for p in build(architecture, 0).parameters()))
    outcome.samples["a vector to the device and back, GB/s"] = Samples(tuple(_way(vector, device, seconds)))
    if device.type == "cuda":
        for share in ("1", "0.5", "0.25"):
            try:
                outcome.samples[f"{share} of the GPU a client: s a round"] = Samples(tuple(at_once(plan, share)))
            except FedjetsError as error:  # no CIFAR-10 here
                outcome.facts[f"{share} of the GPU a client"] = str(error)
    return outcome


def _way(vector: torch.Tensor, device: torch.device, seconds: float) -> list[float]:
    def there_and_back() -> int:
        return 2 * vector.to(device).cpu().nbytes

    return [rate / 1e9 for rate in rates(there_and_back, device, seconds)]


def _paper() -> Config:
    return Config.from_flat(read_preset("cifar10-paper"))


def _architecture(config: Config) -> Architecture:
    m = config.model
    return Architecture(m.name, m.width, m.norm, m.stem, 3, 10)


def _presets_of(model: str) -> Iterator[tuple[str, Config]]:
    for name in preset_names():
        config = Config.from_flat(read_preset(name))
        if config.model.name == model:
            yield name, config


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fedjets-bench-gpu-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Measure and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU if need be, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("results/bench"), help="folder of the results")
    chosen = parser.parse_args()
    if not (torch.cuda.is_available() or chosen.quick):
        print("no GPU here: PyTorch finds none; --quick shows on a CPU that the benchmark works", file=sys.stderr)
        return NO_GPU
    if chosen.quick and chosen.output == Path("results/bench"):
        parser.error("--quick measures nothing: give it an --output of its own")
    chosen.output.mkdir(parents=True, exist_ok=True)
    with _scratch() as scratch:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        outcome = measure(Plan(1 if chosen.quick else 5, chosen.quick, scratch, scratch), device)
    for bound in outcome.bounds:
        print(f"gpu: {bound.line()}")
    write(outcome, chosen.output)
    print((chosen.output / "README.md").read_text() if chosen.quick else outcome.as_markdown())
    return int(not all(bound.holds for bound in outcome.bounds))


if __name__ == "__main__":
    sys.exit(main())
