"""A simulation: a SuperLink of our own on a free port of this machine, with a private FLWR_HOME.

``flwr run`` alone leaves a daemon behind and shares it with whoever uses the same port. Other users of the machine get
nothing from ours, nor from Ray, which runs the clients: it asks for a token and listens on loopback alone. On a Ray
cluster that runs already, who gets in is the cluster's business.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.cpus import cpu_count
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.daemons import (
    flower_environment,
    for_own_user,
    free_ports,
    start_daemon,
    stop_daemons,
    wait_for_port,
)
from fedjets_flwr.launch.own_ray import OwnRay
from fedjets_flwr.launch.ray_cluster import Placement, RayCluster, interleaved
from fedjets_flwr.launch.superlink import STAGED, SuperLink, stage_app

SOCKET_FOLDER = 35
"""Characters of a folder below which Ray's sockets have paths that are short enough for every system."""
GPU_FILES = ("nvidiactl", "nvmap", "kfd", "dxg")
"""Of ``/dev``, where Linux has a GPU that PyTorch can use: NVIDIA's, NVIDIA's Jetson, AMD's, any under Windows."""


@dataclass(frozen=True)
class Resources:
    """What the simulation may use.

    Attributes:
        supernodes: virtual nodes; 0: as many as clients can run at once.
        cpus_per_client: Ray CPUs of a client's process.
        gpus: of a client's process: a number, a fraction of one, or ``auto``: half of one, if there is any.
        parallel: simulations at once that share this machine, each getting as much of it.
    """

    supernodes: int = 0
    cpus_per_client: int = 1
    gpus: str = "auto"
    parallel: int = 1

    def here(self) -> tuple[str, OwnRay]:
        """Return Flower's ``--federation-config`` of a simulation on this machine, and the Ray for it.

        Raises:
            FedjetsError: no client fits the machine, or its share of it.
        """
        share, (fitting,) = self._fit([(cpu_count(), gpu_count())], "here")
        if not 1 <= self.parallel <= fitting:
            raise FedjetsError(
                f"--parallel {self.parallel}: give 1 to {fitting}, the clients that fit here at once: a run needs one"
            )
        at_once = min(fitting // self.parallel, self.supernodes or fitting)
        devices: tuple[str, ...] = ()
        if share and self.parallel > 1:  # each has a Ray of its own, and all would begin with the first GPU
            devices, most = self._devices(share)
            at_once = min(at_once, most)
        used = at_once * self.cpus_per_client
        return f"{self._words(at_once, share)} init-args-num-cpus={used}", OwnRay(used, devices)

    def _devices(self, share: float) -> tuple[tuple[str, ...], int]:
        """Return the GPUs of each of several simulations, and how many clients fit on those of one."""
        names = visible_gpus()
        if (each := len(names) // self.parallel) == 0:
            sharing = -(-self.parallel // len(names))
            return tuple(names[i % len(names)] for i in range(self.parallel)), int(1 / share) // sharing
        slices = [names[i * each : (i + 1) * each] for i in range(self.parallel)]
        return tuple(map(",".join, slices)), self._on_gpus(each, share)

    def on(self, cluster: RayCluster) -> tuple[str, Placement]:
        """Return Flower's ``--federation-config`` of a simulation on a cluster, and what goes where there.

        Raises:
            FedjetsError: no client fits a node of it.
        """
        where = f"free on a node of the Ray cluster {cluster.address}"
        if not any(node.cpus >= 1 for node in cluster.nodes):
            raise FedjetsError(f"--ray-address: no CPU is {where}; wait for what runs there, or add a node")
        share, counts = self._fit([(int(node.cpus), int(node.gpus)) for node in cluster.nodes], where)
        if not any(counts):
            raise FedjetsError(f"--cpus-per-client {self.cpus_per_client} and --gpus {self.gpus} are not both {where}")
        places = interleaved([node.name for node in cluster.nodes], counts)
        return self._words(len(places), share), Placement(cluster.address, places[: self.supernodes or len(places)])

    def _words(self, at_once: int, share: float) -> str:
        return (
            f"num-supernodes={self.supernodes or at_once} client-resources-num-cpus={self.cpus_per_client}"
            f" client-resources-num-gpus={share:g}"
        )

    def _fit(self, machines: Sequence[tuple[int, int]], where: str) -> tuple[float, list[int]]:
        """Return the share of a GPU that a client's process gets, and how many fit each machine's CPUs and GPUs."""
        most = max(cpus for cpus, _ in machines)
        if not 1 <= self.cpus_per_client <= most:
            raise FedjetsError(f"--cpus-per-client {self.cpus_per_client}: give 1 to {most}, the CPUs {where}")
        if self.supernodes < 0:
            raise FedjetsError(f"--supernodes {self.supernodes}: give 1 or more")
        share = self._gpu_share(max(gpus for _, gpus in machines), where)
        return share, [self._count(cpus, gpus, share) for cpus, gpus in machines]

    def _count(self, cpus: int, gpus: int, share: float) -> int:
        at_once = cpus // self.cpus_per_client
        if share:
            # Flower counts processes for the machine; one that fits no single GPU would wait for ever.
            at_once = min(at_once, self._on_gpus(gpus, share))
        return at_once

    @staticmethod
    def _on_gpus(gpus: int, share: float) -> int:
        return gpus * int(1 / share) if share < 1 else int(gpus / share)

    def _gpu_share(self, present: int, where: str) -> float:
        if self.gpus == "auto":
            return 0.5 if present else 0.0
        try:
            share = float(self.gpus)
        except ValueError:
            share = -1.0
        if not (0 <= share <= present and (share <= 1 or share.is_integer())):
            raise FedjetsError(
                f"--gpus {self.gpus}: give auto, 0, a fraction such as 0.5, or a whole number up to {present}, the GPUs"
                f" {where}"
            )
        return share


def gpu_count() -> int:
    """Return the GPUs that PyTorch sees, without starting one up."""
    if sys.platform == "linux" and not any((Path("/dev") / name).exists() for name in GPU_FILES):
        return 0  # without PyTorch, which takes more than a second to import
    import torch

    return torch.cuda.device_count()


def visible_gpus() -> list[str]:
    """Return the names by which ``CUDA_VISIBLE_DEVICES`` calls the GPUs that PyTorch sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(gpu_count())] if named is None else named.split(",")[: gpu_count()]


def private_folder(for_sockets: bool) -> Path:
    """Make a folder for this user alone, and return it; Ray's sockets do not fit into one with a long name."""
    where = tempfile.gettempdir()
    fits = not for_sockets or len(where) + 17 <= SOCKET_FOLDER
    return Path(tempfile.mkdtemp(prefix="fedjets-", dir=where if fits else "/tmp"))


class LocalFlower(SuperLink):
    """A SuperLink of our own, and a simulation that waits for it; they and their folder are gone after the ``with``.

    Attributes:
        log: has what they said, once :meth:`keep_log` was told where.
        daemons: guards of their processes.
    """

    name = "own"

    def __init__(self, where: OwnRay | Placement) -> None:
        """Begin; nothing is started before the ``with`` block.

        Args:
            where: clients' processes go.
        """
        self.log: Path | None = None
        self._where = where
        self.daemons: list[subprocess.Popen[bytes]] = []
        self._prepared = self._over = False

    def alive(self) -> bool:
        return bool(self.daemons) and all(daemon.poll() is None for daemon in self.daemons)

    def hint(self) -> str:
        return f" (its log: {self.log})" if self.log else ""

    def switches(self, home: Path) -> dict[str, str]:
        """Return the environment of all its processes."""
        found = flower_environment(home)
        return found | self._where.environment(home.parent, found["PATH"])

    def __enter__(self) -> "LocalFlower":
        self.prepare()
        try:
            self.launch()
        except BaseException:
            self.__exit__()
            raise
        return self

    def prepare(self) -> None:
        """Make the folder with the app, unless that was done."""
        if not self._prepared:
            self.folder, self._prepared = private_folder(for_sockets=isinstance(self._where, OwnRay)), True
            (self.folder / "flower.log").touch()
            stage_app(self.folder / STAGED)

    def staged(self, scratch: Path) -> Path:
        return self.folder / STAGED

    def keep_log(self, log: Path) -> None:
        """Have the log lie in a folder, at once if that is on the same disk."""
        if self.log != log:
            self.log = log
            with suppress(FileNotFoundError):
                log.replace(log.with_name(f"{log.name}.1"))  # an error may have pointed to it
            with suppress(OSError):
                os.link(self.folder / "flower.log", log)

    def launch(self) -> None:
        """Start all.

        Raises:
            FedjetsError: Flower does not start.
        """
        self.environment = self.switches(self.folder / "flwr")
        (self.folder / "flwr").mkdir()
        if ahead := self._where.ahead(self.folder, self.environment["PATH"]):
            self._start(ahead)
            self.ask_after = 120.0  # one is not Flower's, and its end is seen
        for _ in range(5):
            if self._start_superlink():
                return
        raise FedjetsError("Flower's SuperLink did not start")

    def _start_superlink(self) -> bool:
        port = free_ports(1)[0]
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
        superlink = self._start(for_own_user([*command, "--host", "127.0.0.1", "--port", str(port)]))
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        if wait_for_port(superlink, port):
            return True
        self.daemons.remove(superlink)
        stop_daemons([superlink])
        return False

    def _start(self, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        if self._over:
            raise FedjetsError("Flower was stopped while it started")
        log = self.folder / "flower.log"
        self.daemons.append(start_daemon(command, self.environment, self.folder, log, self.folder))
        return self.daemons[-1]

    def __exit__(self, *_: object) -> None:
        """End all, also what another thread is just starting; it is called again when that has noticed."""
        self._over = True
        if self.called is not None:
            self.called.kill()
        stop_daemons(self.daemons, at_once=True)  # results are elsewhere, and what is here goes
        if not self._prepared:
            return
        if self.log is not None and not self.log.exists():
            with suppress(OSError):  # it was kept before
                shutil.copyfile(self.folder / "flower.log", self.log)
        shutil.rmtree(self.folder, ignore_errors=True)
