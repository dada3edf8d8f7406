"""Whole runs through the real engine, as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.processes import heed_signals

TINY = [
    "run.rounds=2", "run.evaluate-every=1", "partition.clients=8", "partition.unseen-clients=2",
    "partition.samples-per-client=24", "cohort.normals=2", "moe.trainable=head", "moe.init=common",
    "common-expert.target-accuracy=0.3",
]  # fmt: skip


def start(folder: Path, name: str, *arguments: str) -> "subprocess.Popen[str]":
    """Return `fedjets run` under way."""
    pairs = [*TINY, f"run.name={name}", f"run.cache-dir={folder / 'cache'}"]
    options = [part for pair in pairs for part in ("-c", pair)]
    command = [
        sys.executable,
        "-c",
        "from fedjets_flwr.cli.app import main; main()",
        "run",
        "--output-dir",
        str(folder),
    ]
    return subprocess.Popen(
        [*command, *options, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        preexec_fn=heed_signals,
    )  # fmt: skip


def finish(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Return the summary of a run that ended well."""
    process = start(folder, name, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return summary
