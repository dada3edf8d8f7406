"""Deployments for tests: real daemons over TLS, image folders of the bundled digits, runs by ``fedjets run``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.deployment import NAME, Deployment
from fedjets_flwr.launch.local_deployment import as_sites
from fedjets_flwr.launch.superlink import to_toml
from fedjets_flwr.runs.tracking import read_metrics

QUICK: dict[str, Scalar] = {
    "run.name": "deployed", "run.evaluate-every": 1, "run.checkpoint-every": 1, "partition.samples-per-client": 40,
    "moe.trainable": "head", "moe.init": "common", "common-expert.target-accuracy": 0.3,
    "limits.exchange-seconds": 240, "limits.node-seconds": 240,
}  # fmt: skip
ONE_EACH: dict[str, Scalar] = {
    "run.rounds": 1, "partition.name": "quantity", "partition.clients": 2, "partition.unseen-clients": 1,
    "moe.experts": 2, "moe.top-k": 1, "cohort.anchors": 2, "cohort.normals": 0,
}  # fmt: skip
SIX_AND_TWO: dict[str, Scalar] = {
    "run.rounds": 3, "partition.clients": 6, "partition.unseen-clients": 2, "cohort.anchors": 5, "cohort.normals": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Deployed:
    """Daemons that are up, and where things lie.

    Attributes:
        server: the run folder of the ServerApp: checkpoints, common expert, all results.
        here: the run folder that ``fedjets run --superlink`` fills on the user's machine.
        sites: image folders, ``site<client>/<class>/<image>.png``; the last ids are of unseen clients.
    """

    deployment: Deployment
    config: Config
    server: Path
    here: Path
    sites: Path

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start ``fedjets run`` against the SuperLink, as a user of another machine does."""
        preset = self.here.parent / "preset.toml"
        preset.write_text(to_toml(self.config.flat()))
        return subprocess.Popen(
            [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", "run", "--superlink", NAME,
             "--config", str(preset), "--output-dir", str(self.here.parent), *arguments],
            env={**os.environ, "FLWR_HOME": str(self.deployment.folder / "flwr")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.here.parent,
        )  # fmt: skip

    def finish(self, process: "subprocess.Popen[str]", seconds: float = 900) -> dict[str, Any]:
        """Return the summary of a run that must succeed; ``flower.json`` keeps what Flower tells of it."""
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == 0, output + errors
        (self.here / "flower.json").write_text(json.dumps(self.flower_facts()))
        summary: dict[str, Any] = json.loads((self.here / "summary.json").read_text())
        return summary

    def wait_for_round(self, server_round: int, seconds: float = 600) -> None:
        """Return when the user's machine knows a round's record."""
        deadline = time.monotonic() + seconds
        while not any(record["round"] >= server_round for record in read_metrics(self.here)):
            assert time.monotonic() < deadline, f"no round {server_round}"
            time.sleep(0.3)

    def flower_facts(self) -> dict[str, Any]:
        """Return what Flower tells of the newest run."""
        runs = self.deployment.cli("list", NAME, "--format", "json")["runs"]
        newest: dict[str, Any] = runs[0]
        return newest


@contextmanager
def deployed(
    folder: Path, durable: bool = False, nodes: Mapping[int, Mapping[str, Scalar]] | None = None, **changes: Scalar
) -> Iterator[Deployed]:
    """Start SuperLink and SuperNodes for the given settings; all are gone afterwards.

    ``nodes``: by site, what is added to its ``--node-config``.
    """
    flat = QUICK | {"run.output-dir": str(folder / "server"), "run.cache-dir": str(folder / "cache")}
    flat |= {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    config, sites = as_sites(Config.from_flat(flat), folder / "sites", Console(quiet=True))
    for site, own in (nodes or {}).items():
        sites[site] |= own
    here = folder / "here" / config.run_name
    here.parent.mkdir()
    with Deployment(folder / "daemons", sites, durable) as deployment:
        deployment.wait_for_sites()
        yield Deployed(deployment, config, config.run_dir, here, folder / "sites")
