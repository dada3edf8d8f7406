"""From the command to the first training step, `fedjets run` on the digits, the common expert and embeddings cached.

The floor is what nobody can avoid: one import of torch, and one start of Ray with as many actors as there are cores.
The rest, start-up beyond the floor, is bounded. The parts are told by when each process was first seen to do something.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.engine import RIVALS, Engine, ours
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores
from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.launch.daemons import flower_environment
from fedjets_flwr.launch.simulation import Resources

EXTRA = {"strategies/clocked.py": RIVALS / "clocked.py", "client_app/algorithms/clocked.py": RIVALS / "clocked.py"}
MARKS = {
    "method module imported": "flwr-simulation up, torch and the app imported",
    "run": "the ServerApp's main runs: data and common expert",
    "nodes known": "Ray and its actors up, torch imported there, nodes described",
    "prepared": "every client prepared",
    "first step": "cohort, routing, first job",
}
RAY = """
import ray
ray.init(num_cpus={cores}, include_dashboard=False, log_to_driver=False)
@ray.remote(num_cpus=1)
class Actor:
    def ping(self):
        return 1
ray.get([actor.ping.remote() for actor in [Actor.remote() for _ in range({cores})]])
"""


def measure(plan: Plan) -> Outcome:
    """Start again and again, each time beside the floor's two parts."""
    outcome = Outcome("start", (__doc__ or "").strip())
    beyond, total, torch_import, ray_start = [], [], [], []
    parts: dict[str, list[float]] = {}
    for turn in range(plan.rounds + 1):
        torch_import.append(_seconds("import torch"))
        ray_start.append(_seconds(RAY.format(cores=cores())))
        seconds = _start(plan, turn)
        total.append(sum(seconds.values()))
        beyond.append(total[-1] - torch_import[-1] - ray_start[-1])
        for name, value in seconds.items():
            parts.setdefault(name, []).append(value)
    warm = slice(1, None)  # the first start fills the caches
    outcome.bounds = [Bound("start-up beyond import torch and Ray", Samples(tuple(beyond[warm])), 10.0, "s")]
    outcome.samples = {
        "command to first training step, s": Samples(tuple(total[warm])),
        "import torch, s": Samples(tuple(torch_import[warm])),
        "Ray with its actors, s": Samples(tuple(ray_start[warm])),
    }
    outcome.samples |= {f"part: {name}, s": Samples(tuple(values[warm])) for name, values in parts.items()}
    return outcome


def _start(plan: Plan, turn: int) -> dict[str, float]:
    """Return the seconds of each part of one start."""
    changes: dict[str, Scalar] = {"strategy.name": "clocked", "moe.trainable": "head", "moe.init": "common"}
    config = settings(plan, f"start-{turn}", changes)
    command = time.time()
    imports = _seconds("import fedjets_flwr.launch.follow")  # what the command does before it starts Flower
    clock = config.run_dir / "clock"
    before = time.time()
    with ours(config, Resources(), EXTRA) as engine:
        handed_over = time.time()
        _wait(clock, engine)
        marks = dict(line.split("\t") for line in reversed(clock.read_text().splitlines()))
    times = {name: float(marks[name]) for name in MARKS}
    found = {"the command's own imports": imports, "SuperLink up, app handed over": handed_over - before}
    previous = handed_over
    for name, about in MARKS.items():
        found[about] = times[name] - previous
        previous = times[name]
    assert command < previous
    return found


def _wait(clock: Path, engine: Engine, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not (clock.is_file() and "first step" in clock.read_text()):
        if time.monotonic() > deadline or not engine.running:
            raise RuntimeError("no training step came")
        time.sleep(0.05)


def _seconds(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**flower_environment(), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - begun
