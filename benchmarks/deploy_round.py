"""A round on real daemons: seconds and bytes of ours and of the same round done naively, on one machine over TLS.

Both run on the same deployment, six training sites and two unseen ones with image folders of the bundled digits, one
after the other. Naive is stock Flower's FedAvg over all experts (``rivals/naive_deployed.py``).
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.deployment import NAME, Deployment
from fedjets_flwr.launch.local_deployment import as_sites
from fedjets_flwr.launch.superlink import Launched, to_toml
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.expert import gate_inputs
from fedjets_flwr.runs.tracking import read_metrics

SETTINGS: dict[str, Scalar] = {
    "run.name": "ours", "run.evaluate-every": 1, "run.checkpoint-every": 1000,
    "partition.clients": 6, "partition.unseen-clients": 2, "cohort.normals": 1,
}  # fmt: skip
TINY: dict[str, Scalar] = {
    "partition.name": "quantity", "partition.clients": 2, "partition.unseen-clients": 1, "moe.experts": 2,
    "moe.top-k": 1, "cohort.anchors": 2, "cohort.normals": 0, "common-expert.target-accuracy": 0.3,
}  # fmt: skip


def measure(plan: Plan) -> Outcome:
    """Return seconds and bytes of a round, ours and naive."""
    flat = SETTINGS | {"run.rounds": plan.rounds, "run.output-dir": str(plan.scratch / "runs")}
    flat |= {"run.cache-dir": str(plan.scratch / "cache")} | (TINY if plan.quick else {})
    config, sites = as_sites(Config.from_flat(flat), plan.scratch / "sites", Console(quiet=True))
    with Deployment(plan.scratch / "daemons", sites) as deployment:
        deployment.wait_for_sites(300)
        launched = deployment.submit(config, config.run_dir)
        ours_total = finish(launched)
        records = read_metrics(config.run_dir)
        ours = [record["seconds"]["round"] - record["seconds"].get("inspect", 0.0) for record in records]
        launched, lines = submit_naive(deployment, config, plan)
        naive_total = finish(launched)
    stamps = [json.loads(line) for line in lines.read_text().splitlines()]
    naive = [b["time"] - a["time"] for a, b in zip(stamps, stamps[1:], strict=False)]
    return Outcome(
        "deploy_round",
        f"One round of {config.partition.clients} training sites and the evaluation on"
        f" {config.partition.unseen_clients} others, on real daemons over loopback and TLS. Naive: stock Flower FedAvg,"
        " every expert to everybody, one array per tensor.",
        bounds=[Bound("seconds of a round, ours / naive", ratios(ours, naive), 1.0)],
        samples={
            "ours, seconds": Samples(tuple(ours)),
            "naive, seconds": Samples(tuple(naive)),
            "ours, bytes of vectors": Samples(tuple(float(record["wire_bytes"]) for record in records)),
        },
        facts={
            "ours, bytes of the whole run by Flower's count": ours_total,
            "naive, bytes of the whole run by Flower's count": naive_total,
            "ours, bytes down, up and served in the median round": [
                statistics.median(record[name] for record in records)
                for name in ("bytes_down", "bytes_up", "bytes_served")
            ],
            "naive, arrays and bytes in a message": [stamps[0]["arrays"], stamps[0]["bytes"]],
        },
    )


def finish(launched: Launched) -> int:
    """Wait for the end of a run; return the bytes that Flower counted between SuperLink and SuperNodes.

    Raises:
        RuntimeError: the run failed.
    """
    while True:
        facts = launched.facts()
        if str(facts["status"]).startswith("finished"):
            break
        time.sleep(5)
    if facts["status"] != "finished:completed":
        raise RuntimeError(f"{facts['status']} {facts.get('status-details')}")
    return int(facts["network-traffic"]["total-bytes"])


def submit_naive(deployment: Deployment, config: Config, plan: Plan) -> tuple[Launched, Path]:
    """Submit the naive app; return the run and the file with a line for each round."""
    lines, trained, evaluated = plan.scratch / "lines.jsonl", config.partition.clients, config.partition.unseen_clients
    settings: dict[str, Scalar] = {
        "lines": str(lines), "rounds": plan.rounds, "experts": config.moe.experts,
        "nodes": trained + evaluated, "trained": trained, "evaluated": evaluated,
        "model": config.model.name, "width": config.model.width,
        "channels": config.data.channels, "size": config.data.size, "classes": config.data.classes,
        "inputs": gate_inputs(load_common_expert(Path(config.common_expert.path)), config.common_expert.embedding),
    }  # fmt: skip
    app = plan.scratch / "naive-deployed"
    app.mkdir()
    shutil.copy(Path(__file__).parent / "rivals" / "naive_deployed.py", app)
    (app / "pyproject.toml").write_text(
        '[project]\nname = "naive-deployed"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "fedjets"\n'
        '[tool.flwr.app.components]\nserverapp = "naive_deployed:server"\nclientapp = "naive_deployed:client"\n'
        "[tool.flwr.app.config]\n" + to_toml(settings)
    )
    reply: dict[str, Any] = deployment.cli("run", str(app), NAME, "--format", "json")
    return Launched(deployment, str(reply["run-id"]), plan.scratch), lines
