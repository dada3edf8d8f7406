"""A whole deployment as real processes on this machine: one SuperLink, a SuperNode per site, TLS, registered keys."""

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.credentials import ROSTER, make_server_credentials, make_site_keys
from fedjets_flwr.launch.daemons import (
    flower_environment,
    for_own_user,
    free_ports,
    kill_daemon,
    start_daemon,
    stop_daemons,
    wait_for_port,
)
from fedjets_flwr.launch.superlink import SuperLink
from fedjets_flwr.names import UNSEEN, VALIDATION

NAME = "deployed"


@dataclass(frozen=True)
class Keys:
    """Files of a SuperNode: its private key, and the authority by which it knows the SuperLink."""

    private: Path
    authority: Path


class Deployment(SuperLink):
    """SuperLink and SuperNodes; a context manager that ends them all, whatever some of them suffered meanwhile.

    Attributes:
        folder: ``keys/``, ``logs/``, a FLWR_HOME and a cache for each daemon.
        sites: the ``--node-config`` of each client.
        durable: the SuperLink keeps its state in a database and survives its own end. Without one it is faster, and no
            "database is locked", which ends SuperNodes, comes up on a busy machine.
    """

    name = NAME

    def __init__(self, folder: Path, sites: Mapping[int, Mapping[str, Scalar]], durable: bool = False) -> None:
        self.folder, self.sites, self.durable = folder, dict(sites), durable
        self.environment = flower_environment(folder / "flwr")
        self.port = free_ports(1)[0]
        self._superlink: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Deployment":
        for name in ("flwr", "keys", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        make_server_credentials(self.folder / "keys", ["127.0.0.1"], days=30)
        unseen, validation = (sum(s.get("role") == role for s in self.sites.values()) for role in (UNSEEN, VALIDATION))
        make_site_keys(self.folder / "keys", list(self.sites), unseen, validation)
        (self.folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n[superlink.{NAME}]\naddress = "127.0.0.1:{self.port}"\n'
            f"root-certificates = {json.dumps(str(self.keys / 'ca.crt'))}\n"
        )
        try:
            self.start_superlink()
            for client in self.sites:
                self.register(self.keys / f"site-{client}.pub")
                self.start_site(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        stop_daemons([*self._nodes.values(), *([self._superlink] if self._superlink else [])])

    @property
    def keys(self) -> Path:
        """Folder of keys and certificates."""
        return self.folder / "keys"

    @property
    def roster(self) -> Path:
        """File that binds the sites' keys to their client ids (``nodes.roster``)."""
        return self.keys / ROSTER

    def log(self, name: str = "superlink") -> Path:
        """Return the log of a daemon: the SuperLink, or a SuperNode with its ClientApps."""
        return self.folder / "logs" / f"{name}.log"

    def alive(self) -> bool:
        return self._superlink is not None and self._superlink.poll() is None

    def hint(self) -> str:
        return f" (its log: {self.log()})"

    def start_superlink(self) -> None:
        """Start the SuperLink; a durable one goes on with the database of the one before it.

        Raises:
            FedjetsError: it does not come up.
        """
        self._superlink = start_daemon(
            for_own_user(
                ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth",
                 "--ssl-ca-certfile", "keys/ca.crt", "--ssl-certfile", "keys/server.crt",
                 "--ssl-keyfile", "keys/server.key", *(["--database", "superlink.db"] if self.durable else [])]
            ),
            self.environment, self.folder, self.log(), self.folder,
        )  # fmt: skip
        if not wait_for_port(self._superlink, self.port):
            raise FedjetsError(f"the SuperLink did not start; its log: {self.log()}")

    def kill_superlink(self) -> None:
        """SIGKILL the SuperLink."""
        assert self._superlink is not None
        kill_daemon(self._superlink)

    def register(self, public_key: Path) -> None:
        """Tell the SuperLink a site's public key; without it the site is refused."""
        self.cli("supernode", "register", str(public_key), NAME, "--format", "json")

    def start_site(self, client: int) -> None:
        """Start the SuperNode of a client."""
        keys = Keys(self.keys / f"site-{client}", self.keys / "ca.crt")
        self.start_node(f"site{client}", {"client-id": client} | dict(self.sites[client]), keys)

    def start_node(self, name: str, node_config: Mapping[str, Scalar], keys: Keys) -> "subprocess.Popen[bytes]":
        """Start a SuperNode with a folder of its own and return its process."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        own = {"cache-dir": str(home / "cache")} | dict(node_config)
        self._nodes[name] = start_daemon(
            for_own_user(
                ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_ports(1)[0]),
                 "--root-certificates", str(keys.authority), "--auth-supernode-private-key", str(keys.private),
                 "--node-config", to_node_config(own)]
            ),
            flower_environment(home / "flwr"), home, self.log(name), self.folder,
        )  # fmt: skip
        return self._nodes[name]

    def kill_site(self, client: int) -> None:
        """SIGKILL a site's SuperNode."""
        kill_daemon(self._nodes[f"site{client}"])

    def site_pid(self, client: int) -> int:
        """Return the process id of a site's SuperNode."""
        return self._nodes[f"site{client}"].pid

    def wait_for_sites(self, seconds: float = 120) -> None:
        """Return when every SuperNode is connected.

        Raises:
            FedjetsError: names a site that ended, or that the time is over.
        """
        deadline = time.monotonic() + seconds
        while True:
            for name, process in self._nodes.items():
                if process.poll() is not None:
                    raise FedjetsError(f"the SuperNode {name} ended; its log: {self.log(name)}")
            waiting = [n for n in self._nodes if "SuperNode ID" not in self.log(n).read_text(errors="replace")]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise FedjetsError(f"{waiting[0]} does not reach the SuperLink; its log: {self.log(waiting[0])}")
            time.sleep(0.3)


def to_node_config(values: Mapping[str, Scalar]) -> str:
    """Return a ``--node-config``: TOML values, blanks between the pairs."""
    return " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
