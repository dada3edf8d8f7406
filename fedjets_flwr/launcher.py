"""A simulation on this machine: a SuperLink of our own on a free port, with a private FLWR_HOME.

``flwr run`` alone leaves a daemon behind and shares it with whoever uses the same port.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.processes import flower_environment, free_ports, start_daemon, stop_daemons, wait_for_port
from fedjets_flwr.superlink import SuperLink


@dataclass(frozen=True)
class Resources:
    """What the simulation may use.

    Attributes:
        supernodes: virtual nodes; 0: as many as clients can run at once.
        cpus_per_client: Ray CPUs of a client's process.
        gpus_per_client: Ray GPUs (a fraction shares one) of a client's process.
    """

    supernodes: int = 0
    cpus_per_client: int = 1
    gpus_per_client: float = 0.0

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
        nodes = self.supernodes or cpus // self.cpus_per_client
        return (
            f"num-supernodes={nodes} client-resources-num-cpus={self.cpus_per_client}"
            f" client-resources-num-gpus={self.gpus_per_client} init-args-num-cpus={cpus}"
        )


class LocalFlower(SuperLink):
    """A SuperLink of our own; it and its folder are gone after the ``with`` block."""

    name = "own"

    def __init__(self, log: Path) -> None:
        self._log = log

    def alive(self) -> bool:
        return self._superlink.poll() is None

    def hint(self) -> str:
        return f" (its log: {self._log})"

    def __enter__(self) -> "LocalFlower":
        try:
            return self._enter()
        except BaseException:
            self.__exit__()
            raise

    def _enter(self) -> "LocalFlower":
        self.folder = Path(tempfile.mkdtemp(prefix="fedjets-"))
        self.environment = flower_environment(self.folder / "flwr")
        (self.folder / "flwr").mkdir()
        self._log.write_bytes(b"")
        for _ in range(5):
            if self._start_superlink():
                return self
        raise FedjetsError(f"Flower's SuperLink did not start; its log: {self._log}")

    def _start_superlink(self) -> bool:
        port = free_ports(1)[0]
        self._superlink = start_daemon(
            ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1",
             "--port", str(port)],
            self.environment, self.folder, self._log,
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
