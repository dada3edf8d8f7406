"""A simulation on this machine: a SuperLink of our own on a free port, with a private FLWR_HOME.

``flwr run`` alone leaves a daemon behind and shares it with whoever uses the same port. Other users of the machine get
nothing from ours, nor from Ray, which runs the clients: it asks for a token and listens on loopback alone.
"""

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.daemons import (
    flower_environment,
    for_own_user,
    free_ports,
    start_daemon,
    stop_daemons,
    wait_for_port,
)
from fedjets_flwr.launch.superlink import SuperLink

SOCKET_FOLDER = 35
"""Characters of a folder below which Ray's sockets have paths that are short enough for every system."""


@dataclass(frozen=True)
class Resources:
    """What the simulation may use.

    Attributes:
        supernodes: virtual nodes; 0: as many as clients can run at once.
        cpus_per_client: Ray CPUs of a client's process.
        gpus: of a client's process: a number, a fraction of one, or ``auto``: half of one, if there is any.
    """

    supernodes: int = 0
    cpus_per_client: int = 1
    gpus: str = "auto"

    def federation_config(self) -> str:
        """Return Flower's ``--federation-config``.

        Raises:
            FedjetsError: no client fits the machine.
        """
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if not 1 <= self.cpus_per_client <= cpus:
            raise FedjetsError(f"--cpus-per-client {self.cpus_per_client}: give 1 to {cpus}, the CPUs here")
        if self.supernodes < 0:
            raise FedjetsError(f"--supernodes {self.supernodes}: give 1 or more")
        present = gpu_count()
        share = self._gpu_share(present)
        at_once = cpus // self.cpus_per_client
        if share:
            # Flower counts processes for the machine; one that fits no single GPU would wait for ever.
            at_once = min(at_once, present * int(1 / share) if share < 1 else int(present / share))
        return (
            f"num-supernodes={self.supernodes or at_once} client-resources-num-cpus={self.cpus_per_client}"
            f" client-resources-num-gpus={share:g} init-args-num-cpus={at_once * self.cpus_per_client}"
        )

    def _gpu_share(self, present: int) -> float:
        if self.gpus == "auto":
            return 0.5 if present else 0.0
        try:
            share = float(self.gpus)
        except ValueError:
            share = -1.0
        if not (0 <= share <= present and (share <= 1 or share.is_integer())):
            raise FedjetsError(
                f"--gpus {self.gpus}: give auto, 0, a fraction such as 0.5, or a whole number up to {present}, the GPUs"
                " here"
            )
        return share


def gpu_count() -> int:
    """Return the GPUs that PyTorch sees, without starting one up."""
    import torch

    return torch.cuda.device_count()


def ray_environment(folder: Path) -> dict[str, str]:
    """Return the environment by which Ray serves this run alone.

    The token is in no file: Ray would make one that everybody reads. Ray's files, which it lets everybody write, are in
    the folder.

    Args:
        folder: where only this user comes.
    """
    return {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": str(folder),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: a node of Ray is at 127.0.0.1
    }  # fmt: skip


def private_folder() -> Path:
    """Make a folder for this user alone, where Ray's sockets fit, and return it."""
    where = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="fedjets-", dir=where if len(where) + 17 <= SOCKET_FOLDER else "/tmp"))


class LocalFlower(SuperLink):
    """A SuperLink of our own; it and its folder are gone after the ``with`` block."""

    name = "own"

    def __init__(self, log: Path) -> None:
        self._log = log

    def alive(self) -> bool:
        return self._superlink.poll() is None

    def hint(self) -> str:
        return f" (its log: {self._log})"

    def switches(self, home: Path) -> dict[str, str]:
        """Return the environment of all its processes."""
        return flower_environment(home) | ray_environment(home.parent)

    def __enter__(self) -> "LocalFlower":
        try:
            return self._enter()
        except BaseException:
            self.__exit__()
            raise

    def _enter(self) -> "LocalFlower":
        self.folder = private_folder()
        self.environment = self.switches(self.folder / "flwr")
        (self.folder / "flwr").mkdir()
        self._log.write_bytes(b"")
        for _ in range(5):
            if self._start_superlink():
                return self
        raise FedjetsError(f"Flower's SuperLink did not start; its log: {self._log}")

    def _start_superlink(self) -> bool:
        port = free_ports(1)[0]
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        self._superlink = start_daemon(
            for_own_user([*command, "--host", "127.0.0.1", "--port", str(port)]),
            self.environment, self.folder, self._log, self.folder,
        )  # fmt: skip
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        if wait_for_port(self._superlink, port):
            return True
        stop_daemons([self._superlink])
        return False

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_superlink"):
            stop_daemons([self._superlink])
        shutil.rmtree(self.folder, ignore_errors=True)
