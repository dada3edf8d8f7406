"""What a user waits for in a run of one round: `fedjets run` on the digits, the common expert and embeddings cached.

The floor is what nobody can avoid: one import of torch, and one start of Ray with as many actors as there are cores.
*launch* is from the command to the first word of the ServerApp, *prepare* to the first round (clients' processes, data
and embeddings), *end* from the last round's end to the prompt: pictures, and all processes gone.
"""

import json
import os
import subprocess
import sys
import time

from benchmarks.outcome import Bound, Outcome, Plan, Samples, cores
from fedjets_flwr.launch.daemons import flower_environment

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
    """Run again and again, each time beside the floor's two parts."""
    outcome = Outcome("start", (__doc__ or "").strip())
    found: dict[str, list[float]] = {}
    for turn in range(plan.rounds + 1):
        torch_import, ray_start = _seconds("import torch"), _seconds(RAY.format(cores=cores()))
        parts = _run(plan, f"start-{turn}")
        if turn:  # the first start fills the caches
            whole = parts["all of it"]
            told = {"beyond": whole - torch_import - ray_start, "import torch": torch_import, "Ray": ray_start} | parts
            for name, value in told.items():
                found.setdefault(name, []).append(value)
    samples = {name: Samples(tuple(values)) for name, values in found.items()}
    outcome.bounds = [
        Bound("a run of one round, from the command to the prompt", samples.pop("all of it"), 12.0, "s"),
        Bound("the same beyond import torch and Ray", samples.pop("beyond"), 6.0, "s"),
    ]
    outcome.samples = {f"{name}, s": values for name, values in samples.items()}
    return outcome


def _run(plan: Plan, name: str) -> dict[str, float]:
    """Return the seconds of a whole run, and of its parts."""
    settings = f"run.name={name} run.rounds=1 run.output-dir={plan.scratch} run.cache-dir={plan.scratch / 'cache'}"
    command = time.time()
    subprocess.run(
        [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", "run", "-c", settings],
        check=True, env=_environment(),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    prompt = time.time()
    folder = plan.scratch / name
    summary = json.loads((folder / "summary.json").read_text())
    last = (folder / "metrics.jsonl").stat().st_mtime
    return {
        "all of it": prompt - command,
        "launch": summary["seconds_before"]["launch"],
        "prepare": summary["seconds_before"]["prepare"],
        "round": summary["seconds"]["round"],
        "end": prompt - last,
    }


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("FEDJETS_CACHE", "FEDJETS_DATA")}


def _seconds(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**flower_environment(), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - begun
