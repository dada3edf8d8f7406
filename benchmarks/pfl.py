"""pfl-research's CIFAR-10 benchmark: 1,000 clients of 50 images, cohort 50, batch 10, a 2-convolution CNN, FedAvg.

Ours against pfl 0.6.0 in an environment of its own (with the same torch), a stock Flower app and a bare PyTorch loop,
on all cores; nobody evaluates. Each rival is tried in several settings (processes or torch threads, memory layout) and
counts in its fastest. All read the same normalised images, ours as uint8 that it normalises batch by batch.
"""

import os
import subprocess
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bare import BareLoop
from benchmarks.engine import RIVALS, end, ours, stock
from benchmarks.fixtures import random_common_expert, settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores, matmul_peak, ratios
from benchmarks.paced import Paced, descendants
from benchmarks.rivals.two_convolutions import two_convolutions
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_dataset
from fedjets_flwr.data.transforms import normalise
from fedjets_flwr.launch.simulation import Resources
from fedjets_flwr.models.architectures import Architecture

CLIENTS, COHORT, SAMPLES, BATCH, RATE = 1000, 50, 50, 10, 0.1
FLOPS = 3 * 2 * SAMPLES * COHORT * (30 * 30 * 27 * 32 + 28 * 28 * 288 * 64 + 64 * 14 * 14 * 128 + 1280)
EXTRA = {
    "strategies/two_convolutions.py": RIVALS / "two_convolutions.py",
    "client_app/algorithms/two_convolutions.py": RIVALS / "two_convolutions.py",
}
Candidate = Callable[[], AbstractContextManager[Paced]]
REQUIREMENTS = ("pfl==0.6.0", "multiprocess<0.71", "dp-accounting<0.6", "prv-accountant<0.3")


def measure(plan: Plan) -> Outcome:
    """Alternate blocks of rounds of all sides."""
    config = our_settings(plan)
    data = _data(plan, config)
    block = 1 if plan.quick else 3
    outcome = Outcome("pfl", (__doc__ or "").strip())
    with ExitStack() as stack:
        sides: dict[str, Paced] = {"ours": stack.enter_context(ours(config, Resources(), EXTRA))}
        sides["ours"].rounds(2, seconds=600)
        sides["pfl"] = _fastest("pfl", _pfl_candidates(plan, data), stack, outcome)
        sides["stock Flower"] = _fastest("stock Flower", _stock_candidates(plan, data), stack, outcome)
        jobs = _jobs(data)
        bare = BareLoop(Worker, Worker.train, lambda job: 1)
        bare.choose(jobs, 1)
        seconds: dict[str, list[float]] = {name: [] for name in [*sides, "bare loop"]}
        for _ in range(plan.rounds):
            for name, side in sides.items():
                seconds[name].append(sum(side.rounds(block, seconds=600)) / block)
            seconds["bare loop"].append(sum(bare.round(jobs) for _ in range(block)) / block)
    outcome.bounds = [
        Bound("ours / pfl", ratios(seconds["ours"], seconds["pfl"]), 1.0),
        Bound("ours / stock Flower", ratios(seconds["ours"], seconds["stock Flower"]), 0.55),
    ]
    outcome.samples = {f"{name}, s a round": Samples(tuple(values)) for name, values in seconds.items()}
    outcome.samples["ours / bare loop"] = ratios(seconds["ours"], seconds["bare loop"])
    peak = matmul_peak()
    outcome.samples["share of the matrix-product peak, ours"] = Samples(
        tuple(FLOPS / s / peak for s in seconds["ours"])
    )
    outcome.facts |= {"GFLOP of training in a round": round(FLOPS / 1e9), "bare loop's faster setting": bare.mode}
    return outcome


def our_settings(plan: Plan) -> Config:
    """Return what makes ours this benchmark; Dirichlet shares of a huge concentration are equal."""
    changes: dict[str, Scalar] = {
        "strategy.name": "two_convolutions", "data.name": "cifar10", "partition.name": "dirichlet",
        "partition.alpha": 1e6, "partition.clients": CLIENTS, "partition.unseen-clients": 1,
        "partition.samples-per-client": SAMPLES, "partition.unseen-samples": SAMPLES, "moe.experts": 1, "moe.top-k": 1,
        "cohort.anchors": 0, "cohort.normals": COHORT, "train.lr": RATE, "train.momentum": 0.0,
        "train.batch-size": BATCH,
    }  # fmt: skip
    config = settings(plan, "ours", changes)
    path = plan.scratch / "two-convolutions.safetensors"
    random_common_expert(config, path, Architecture("two-convolutions", 16, "batch", "cifar", 3, 10))
    return Config.from_flat({**config.flat(), "common-expert.path": str(path)})


def _data(plan: Plan, config: Config) -> Path:
    """Write the normalised images and labels as arrays that every process can map."""
    train, folder = open_dataset(config).train, plan.scratch / "data"
    folder.mkdir()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    dataset = open_dataset(config)
    np.save(folder / "images.npy", normalise(train.pixels[order], dataset.mean, dataset.std).numpy())
    np.save(folder / "labels.npy", train.labels[order].numpy())
    return folder


def _jobs(data: Path) -> list[tuple[Tensor, Tensor]]:
    images, labels = (torch.from_numpy(np.load(data / f"{n}.npy", mmap_mode="c")) for n in ("images", "labels"))
    return [(images[i * SAMPLES :][:SAMPLES].clone(), labels[i * SAMPLES :][:SAMPLES]) for i in range(COHORT)]


def _fastest(name: str, candidates: dict[str, Candidate], stack: ExitStack, outcome: Outcome) -> Paced:
    """Run every candidate for a while, and return the fastest, running."""
    tried = {}
    for label, candidate in candidates.items():
        with candidate() as side:
            side.rounds(1, seconds=600)
            tried[label] = min(side.rounds(2, seconds=600))
    best = min(tried, key=lambda label: tried[label])
    outcome.facts[f"{name}'s setting"] = best
    outcome.facts[f"{name}'s settings tried, s"] = ", ".join(f"{label}: {s:.2f}" for label, s in tried.items())
    side = stack.enter_context(candidates[best]())
    side.rounds(1, seconds=600)
    return side


def _pfl_candidates(plan: Plan, data: Path) -> dict[str, Candidate]:
    python = environment(plan.cache)
    found: dict[str, Candidate] = {}
    for processes, threads in ((1, cores()), (cores(), 1)):
        for last, layout in ((False, "channels first"), (True, "channels last")):
            label = f"{processes} processes, {threads} torch threads, {layout}"
            found[label] = partial(pfl, python, plan.scratch, data, processes, threads, last)
    return dict(list(found.items())[:1]) if plan.quick else found


def _stock_candidates(plan: Plan, data: Path) -> dict[str, Candidate]:
    def candidate(cpus: int) -> AbstractContextManager[Paced]:
        given: dict[str, Scalar] = {
            "task": "cifar10", "data": str(data), "samples": SAMPLES, "nodes": CLIENTS, "fraction": COHORT / CLIENTS,
            "threads": cpus,
        }  # fmt: skip
        return stock(Path(tempfile.mkdtemp(dir=plan.scratch)), given, Resources(CLIENTS, cpus_per_client=cpus))

    found: dict[str, Candidate] = {
        f"{cores() // n} processes, {n} torch threads": partial(candidate, n) for n in (1, cores())
    }
    return dict(list(found.items())[:1]) if plan.quick else found


@contextmanager
def pfl(python: Path, scratch: Path, data: Path, processes: int, threads: int, last: bool) -> Iterator[Paced]:
    """Run pfl's own simulation, under torchrun where it has several processes."""
    lines = Path(tempfile.mkdtemp(dir=scratch)) / "lines.jsonl"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [str(python), *(launcher if processes > 1 else []), str(RIVALS / "pfl_cifar10.py")]
    with (lines.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(data), str(lines), str(threads), str(int(last))],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def pids() -> list[int]:
        return [process.pid, *descendants(process.pid)]

    side = Paced(lines, pids, lambda: process.poll() is None)
    try:
        yield side
    except Exception:
        print((lines.parent / "log").read_text()[-3000:])
        raise
    finally:
        side.resume()
        running = pids()
        process.terminate()
        process.wait()
        end(running)


def environment(cache: Path) -> Path:
    """Return the Python of an environment with pfl, made on first use; torch and its kin are those that run here."""
    folder = cache / f"pfl-0.6.0-python{sysconfig.get_python_version()}"
    python = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *REQUIREMENTS], check=True)
        (folder / "installed").touch()
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "zz_shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # of whoever runs this now
    return python


class Worker:
    """The model of one thread."""

    def __init__(self) -> None:
        self.model = two_convolutions(Architecture("two-convolutions", 16, "batch", "cifar", 3, 10)).train()
        self._start = [p.detach().clone() for p in self.model.parameters()]

    def train(self, data: tuple[Tensor, Tensor]) -> None:
        """Do one client's epoch from the common start."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.parameters()), self._start)
        images, labels = data
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(self.model(images[rows]), labels[rows]).backward()
            optimizer.step()
