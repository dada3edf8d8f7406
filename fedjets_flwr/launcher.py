"""Starts a run through Flower on a SuperLink of its own, follows it, and tells truly how it ended.

``flwr run`` alone leaves a daemon behind, shares it with whoever uses the same port, and exits 0 when the app failed.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedjets_flwr.config import Config, Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.tracking import read_metrics

APP_ROOT = Path(__file__).resolve().parent.parent
APP_PARTS = ("fedjets_flwr", "client_app", "server_app", "strategies", "pyproject.toml", "LICENSE", "README.md")
SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


FOLDERS = ("FEDJETS_DATA", "FEDJETS_CACHE")


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


class Launched:
    """A run that was handed to Flower."""

    def __init__(self, config: Config, flwr: "LocalFlower", run_id: str) -> None:
        self.config, self._flwr, self.run_id = config, flwr, run_id

    def status(self) -> tuple[str, str]:
        """Return Flower's status and details, e.g. ``("finished:completed", "")``."""
        runs = self._flwr.cli("list", "--run-id", self.run_id, "own", "--format", "json")["runs"]
        return str(runs[0]["status"]), str(runs[0].get("status-details") or "")

    def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield (what goes on before round 1, the records so far) until Flower calls the run finished."""
        folder, polled, failures = self.config.run_dir, 0.0, 0
        read, records = -1, read_metrics(folder)
        while True:
            metrics = folder / "metrics.jsonl"
            size = metrics.stat().st_size if metrics.is_file() else 0
            if size != read:
                read, records = size, read_metrics(folder)
            yield _text(folder / "progress.json"), records
            ended = (folder / "summary.json").is_file() or (folder / "error.json").is_file()
            if time.monotonic() - polled > (1 if ended else 15):
                polled = time.monotonic()
                try:
                    status, _ = self.status()
                    failures = 0
                except (FedjetsError, subprocess.TimeoutExpired, LookupError):
                    # A busy machine may miss an answer or two.
                    failures += 1
                    if failures > 5 or not self._flwr.alive():
                        raise FedjetsError(f"Flower's SuperLink does not answer; see {folder / 'flower.log'}") from None
                    continue
                if status.startswith("finished"):
                    return
            time.sleep(0.3)

    def outcome(self) -> dict[str, Any]:
        """Return the summary.

        Raises:
            FedjetsError: the run failed, by Flower's word or for lack of a summary.
        """
        status, details = self.status()
        summary = self.config.run_dir / "summary.json"
        if status == "finished:completed" and summary.is_file():
            found: dict[str, Any] = json.loads(summary.read_text())
            if found["status"] == "completed":
                return found
        error = self.config.run_dir / "error.json"
        if error.is_file():
            raise FedjetsError(json.loads(error.read_text())["reason"])
        log = self.config.run_dir / "run.log"
        raise FedjetsError(f"the run ended as {status} {details}; its log: {log}")

    def keep_log(self, path: Path) -> None:
        """Write what server and clients logged to a file of the run folder."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            path.write_text(self._flwr.call("log", self.run_id, "own", "--show").stdout)

    def stop(self) -> None:
        """Ask Flower to stop the run."""
        with contextlib.suppress(FedjetsError, subprocess.TimeoutExpired):
            self._flwr.cli("stop", self.run_id, "own", "--format", "json")


class LocalFlower:
    """A SuperLink of our own on a free port, with a private FLWR_HOME; both are gone after the ``with`` block."""

    def __init__(self, log: Path) -> None:
        self._log_path = log

    def alive(self) -> bool:
        """Return whether the SuperLink still runs."""
        return self._superlink.poll() is None

    def __enter__(self) -> "LocalFlower":
        try:
            return self._enter()
        except BaseException:
            self.__exit__()
            raise

    def _enter(self) -> "LocalFlower":
        self._home = Path(tempfile.mkdtemp(prefix="fedjets-"))
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            **os.environ, **SWITCHES, "FLWR_HOME": str(self._home / "flwr"),
            "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
            "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
            # The server's folder is not the caller's.
            **{k: str(Path(os.environ[k]).expanduser().absolute()) for k in FOLDERS if os.environ.get(k)},
        }  # fmt: skip
        (self._home / "flwr").mkdir()
        self._log = self._log_path.open("wb")
        for _ in range(5):
            if self._start_superlink():
                return self
        raise FedjetsError(f"Flower's SuperLink did not start; its log: {self._log_path}")

    def _start_superlink(self) -> bool:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._superlink = subprocess.Popen(
            ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1",
             "--port", str(port)],
            env=self.environment, stdout=self._log, stderr=subprocess.STDOUT, cwd=self._home,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        (self._home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        for _ in range(150):
            if self._superlink.poll() is not None:
                return False  # most likely another process took the port
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return True
            time.sleep(0.2)
        self._superlink.terminate()
        return False

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_superlink") and self._superlink.poll() is None:
            self._superlink.terminate()
            try:
                self._superlink.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(self._superlink.pid, signal.SIGKILL)
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def run(self, config: Config, resources: Resources) -> Launched:
        """Hand the app and its settings to the SuperLink."""
        staged = self._home / "fedjets-flwr"
        for part in APP_PARTS:
            source = APP_ROOT / part
            if source.is_dir():
                shutil.copytree(source, staged / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                staged.mkdir(exist_ok=True)
                shutil.copy(source, staged / part)
        if not (staged / "pyproject.toml").is_file():
            raise FedjetsError(f"{APP_ROOT} holds no pyproject.toml: install a checkout with `pip install -e .`")
        settings = self._home / "settings.toml"
        settings.write_text(to_toml(config.flat()))
        reply = self.cli(
            "run", str(staged), "own", "--run-config", str(settings),
            "--federation-config", resources.federation_config(), "--format", "json",
        )  # fmt: skip
        return Launched(config, self, str(reply["run-id"]))

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``flwr`` against this SuperLink."""
        command = ["flwr", *arguments]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, cwd=self._home, check=False
        )

    def cli(self, *arguments: str) -> dict[str, Any]:
        """Run ``flwr`` and return its JSON.

        Raises:
            FedjetsError: it failed.
        """
        done = self.call(*arguments)
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            reply = {}
        if done.returncode or not reply.get("success", bool(reply)):
            reason = str(reply.get("error-message") or done.stderr or done.stdout).strip()
            raise FedjetsError(f"flwr {arguments[0]} failed: {reason}")
        return reply


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Return dotted settings as TOML (JSON strings and numbers are valid TOML values)."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flat.items())


def _text(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["text"])
    except (OSError, ValueError):
        return "starting Flower"


def _die_with_parent() -> None:
    """Have the kernel end this child when its parent dies, so that a killed launcher leaves no daemon (Linux)."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
