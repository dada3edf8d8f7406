"""A Ray of our own on this machine, which serves one simulation alone and nobody else."""

import json
import os
import secrets
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.stand_in import stand_in
from fedjets_flwr.launch.superlink import STAGED

READY, ASK = (Path(__file__).with_name(name) for name in ("ready_simulation.py", "ask_simulation.py"))
"""Not imported: Ray and Flower take seconds."""
BESIDE = ["/bin/sh", "-c", '"$@" & wait', "sh"]
"""Starts a command and waits for it: the simulation needs a parent that ends at once, by whose end it knows of ours and
keeps its last round; the guard ends last, and what it started itself ends with it."""
IMPORTED = "torch,flwr.clientapp"
"""By the clients' processes, as soon as Ray has them."""


@dataclass(frozen=True)
class OwnRay:
    """What a Ray of this machine may use.

    Attributes:
        cpus: for clients' processes.
        devices: ``CUDA_VISIBLE_DEVICES`` of each of the simulations that share this machine's GPUs; none: one sees all.
        number: of the simulation among them.
    """

    cpus: int
    devices: tuple[str, ...] = ()
    number: int = 0

    def of(self, number: int) -> "OwnRay":
        """Return that of another simulation of several."""
        return replace(self, number=number)

    def told(self, config: Config) -> dict[str, Scalar]:
        """Return the settings as clients' processes are told them: all of them have the environment of this one."""
        return config.flat()

    def environment(self, folder: Path, path: str) -> dict[str, str]:
        """Return what makes Flower simulate there.

        The token is in no file: Ray would make one that everybody reads. Ray's files, which it lets everybody write,
        are in the folder.

        Args:
            folder: where only this user comes.
            path: on which all other commands are found.
        """
        (folder / "ray.json").write_text(json.dumps({"num_cpus": self.cpus, "include_dashboard": False}))
        return {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: a node of Ray is at 127.0.0.1
            "RAY_ADDRESS": "local",  # whatever the user's own says
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_preload_python_modules": IMPORTED,
            **({"CUDA_VISIBLE_DEVICES": self.devices[self.number]} if self.devices else {}),
            # The very code that Flower gets, whatever is installed or edited meanwhile.
            "PYTHONPATH": os.pathsep.join([str(folder / STAGED), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PATH": stand_in(["-I", "-S", str(ASK), str(folder / "ready")], folder, path),
        }  # fmt: skip

    def ahead(self, folder: Path, path: str) -> list[str]:
        """Return the command that starts beside the SuperLink; none where Flower would not find ours.

        Args:
            folder: the same.
            path: of commands, as it came to be.
        """
        words = ["-P", str(READY), str(folder / "ready"), str(folder / "ray.json")]
        return [*BESIDE, sys.executable, *words] if path.startswith(str(folder)) else []
