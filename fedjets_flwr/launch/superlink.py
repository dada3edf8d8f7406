"""A SuperLink that takes the app: submits a run, follows it, and tells truly how it ended.

``flwr run`` exits 0 when the app failed, so a run is believed only if Flower's status and the summary agree.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

from fedjets_flwr.config.docs import APP_TABLE, app_config
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.daemons import flower_environment
from fedjets_flwr.reading import TOML, read
from fedjets_flwr.release import APP_ROOT, DISTRIBUTION, PACKAGES
from fedjets_flwr.runs.remote_log import Mirror, without_announcements
from fedjets_flwr.runs.stopping import StopRequest
from fedjets_flwr.runs.tracking import read_metrics

STAGED = DISTRIBUTION
PATIENCE = 120.0
"""Seconds without an answer after which a SuperLink is given up."""
LOOK = 0.1
"""Seconds between two looks at a run's files."""
STOP_SECONDS = 7.0
"""Seconds that a stopped run has to keep its last round: a container gets 10 to end altogether."""
LEAVE_SECONDS = 2.0
"""Seconds that a stopped run has before its first round's end."""
CALL_SECONDS = 120.0
"""Seconds within which ``flwr`` must answer."""


class SuperLink:
    """A connection that Flower's configuration names.

    Attributes:
        name: of the connection.
        environment: of the ``flwr`` command; its FLWR_HOME holds the configuration.
        folder: where ``flwr`` runs.
        called: the last ``flwr``, which may still run.
        ask_after: seconds without a round after which it is asked for a run's status, which takes a second of a core.
    """

    name: str
    environment: dict[str, str]
    folder: Path
    called: "subprocess.Popen[str] | None" = None
    ask_after = 15.0

    def alive(self) -> bool:
        """Return whether it may still answer."""
        return True

    def hint(self) -> str:
        """Return where to look when it does not answer."""
        return ""

    def staged(self, scratch: Path) -> Path:
        """Return the app, written below a folder unless it lies somewhere."""
        return stage_app(scratch / STAGED)

    def submit(self, config: Config, folder: Path, federation: str = "") -> "Launched":
        """Hand the app and its settings over.

        Args:
            config: the settings, with the folders of the machine where the ServerApp runs.
            folder: where the results are read on this machine.
            federation: Flower's ``--federation-config``, of a simulation.

        Raises:
            FedjetsError: Flower refused, or nothing answers.
        """
        with tempfile.TemporaryDirectory(prefix="fedjets-") as scratch:
            settings = Path(scratch) / "settings.toml"
            settings.write_text(to_toml(config.flat()))
            simulated = ["--federation-config", federation] if federation else []
            app = str(self.staged(Path(scratch)))
            reply = self.cli("run", app, self.name, "--run-config", str(settings), *simulated, "--format", "json")
        return Launched(self, str(reply["run-id"]), folder)

    def stop(self, run_id: str, folder: Path) -> None:
        """Have a run stop whose ServerApp sees this machine's run folder; it has some seconds to keep its last round.

        Flower is not asked: a simulation hears of it 20 seconds later, and this SuperLink ends with its run.
        """
        StopRequest(folder, run_id).make()
        if not (folder / "progress.json").is_file():
            return  # the ServerApp has not begun with it
        # Before the first round's end there is nothing to keep, but shared memory to give back.
        deadline = time.monotonic() + (STOP_SECONDS if read_metrics(folder) else LEAVE_SECONDS)
        while not ended(folder) and time.monotonic() < deadline:
            time.sleep(0.05)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``flwr``."""
        command = ["flwr", *arguments]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        ) as process:
            self.called = process
            try:
                output, errors = process.communicate(timeout=CALL_SECONDS)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def cli(self, *arguments: str) -> dict[str, Any]:
        """Run ``flwr`` and return its JSON.

        Raises:
            FedjetsError: it failed.
        """
        try:
            done = self.call(*arguments)
        except subprocess.TimeoutExpired:
            raise FedjetsError(f"flwr {arguments[0]} gave no answer within {CALL_SECONDS:g} s") from None
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            reply = {}
        if done.returncode or not reply.get("success", bool(reply)):
            reason = str(reply.get("error-message") or done.stderr or done.stdout).strip()
            raise FedjetsError(f"flwr {arguments[0]} failed: {reason}")
        return reply


class NamedSuperLink(SuperLink):
    """A SuperLink of the user's own Flower configuration, most likely on another machine.

    Raises:
        FedjetsError: the configuration has no such connection.
    """

    def __init__(self, name: str) -> None:
        self.name, self.environment, self.folder = name, flower_environment(), Path.cwd()
        path = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser() / "config.toml"
        known = read(path, TOML, f"--superlink {name}: {path}").get("superlink", {})
        if not isinstance(known, dict):
            raise FedjetsError(f"--superlink {name}: {path}: superlink is no table")
        connection = known.get(name)
        if not isinstance(connection, dict):
            names = ", ".join(key for key, value in known.items() if isinstance(value, dict)) or "none"
            raise FedjetsError(f"--superlink {name}: {path} has no [superlink.{name}] (it has: {names})")
        if str(connection.get("address", "")).startswith(":"):
            raise FedjetsError(
                f"--superlink {name}: that is Flower's simulation on this machine; leave --superlink out"
            )

    def stop(self, run_id: str, folder: Path) -> None:
        """Ask Flower to stop a run; its ServerApp hears of it within half a minute, and keeps its last round."""
        with contextlib.suppress(FedjetsError, subprocess.TimeoutExpired):
            self.cli("stop", run_id, self.name, "--format", "json")


class Launched:
    """A run that was handed to Flower."""

    def __init__(self, superlink: SuperLink, run_id: str, folder: Path) -> None:
        self.superlink, self.run_id, self.folder = superlink, run_id, folder

    def facts(self) -> dict[str, Any]:
        """Return what Flower tells of the run: ``status``, ``network-traffic``, …"""
        runs = self.superlink.cli("list", "--run-id", self.run_id, self.superlink.name, "--format", "json")["runs"]
        found: dict[str, Any] = runs[0]
        return found

    def watch(self) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Yield (what goes on before round 1, the records so far) until Flower calls the run finished."""
        folder, polled, silent_since = self.folder, 0.0, 0.0
        read, records = -1, read_metrics(folder)
        while True:
            metrics = folder / "metrics.jsonl"
            size = metrics.stat().st_size if metrics.is_file() else 0
            if size != read:
                read, records = size, read_metrics(folder)
                polled = time.monotonic()  # it lives: no need to ask, which takes a second of a core
            yield _text(folder / "progress.json"), records
            if time.monotonic() - polled > (1 if ended(folder) else 5 if silent_since else self.superlink.ask_after):
                polled = time.monotonic()
                try:
                    status = str(self.facts()["status"])
                    silent_since = 0.0
                except (FedjetsError, subprocess.TimeoutExpired, LookupError):
                    # A busy machine misses an answer or two, a network more.
                    silent_since = silent_since or polled
                    if time.monotonic() - silent_since > PATIENCE or not self.superlink.alive():
                        raise FedjetsError(
                            f"the SuperLink {self.superlink.name} does not answer any more{self.superlink.hint()};"
                            " when it is back, go on with --resume"
                        ) from None
                    continue
                if status.startswith("finished"):
                    return
            time.sleep(LOOK)

    def outcome(self) -> dict[str, Any]:
        """Return the summary.

        Raises:
            FedjetsError: the run failed, by Flower's word or for lack of a summary.
        """
        facts = self.facts()
        if facts["status"] == "finished:completed" and (self.folder / "summary.json").is_file():
            found = self.summary()
            if found["status"] == "completed":
                return found
        error = self.folder / "error.json"
        if error.is_file():
            raise FedjetsError(json.loads(error.read_text())["reason"])
        raise FedjetsError(
            f"the run ended as {facts['status']} {facts.get('status-details') or ''};"
            f" its log: {self.folder / 'run.log'}"
        )

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` says."""
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    @contextlib.contextmanager
    def mirrored(self) -> Iterator[None]:
        """Bring progress and results here from the run's log, for a ServerApp that runs on another machine."""
        command = ["flwr", "log", self.run_id, self.superlink.name, "--stream"]
        mirror = Mirror(self.folder, command, self.superlink.environment, self.superlink.folder)
        try:
            with mirror:
                yield
        finally:
            # What the stream lost is still in the whole log.
            mirror.read(self._log())

    def keep_log(self) -> None:
        """Write what the server logged to a file of the run folder."""
        if text := without_announcements(self._log()):
            (self.folder / "run.log").write_text(text)

    def stop(self) -> None:
        """Have the run end before its last round."""
        self.superlink.stop(self.run_id, self.folder)

    def _log(self) -> str:
        try:
            return self.superlink.call("log", self.run_id, self.superlink.name, "--show").stdout
        except subprocess.TimeoutExpired:
            return ""


def stage_app(folder: Path) -> Path:
    """Write the app to a folder and return it: the packages as they are installed, and what Flower must know of them.

    Raises:
        FedjetsError: the package is not installed.
    """
    folder.mkdir()
    for package in PACKAGES:
        shutil.copytree(APP_ROOT / package, folder / package)  # with what Python has compiled, for who runs it there
    (folder / "pyproject.toml").write_text(app_project())
    return folder


def app_project() -> str:
    """Return the app's ``pyproject.toml``, made from what is installed: a wheel brings none along.

    Raises:
        FedjetsError: the package is not installed.
    """
    try:
        about = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        raise FedjetsError(
            f"{DISTRIBUTION} is not installed; pip install it, or a checkout with `pip install -e .`"
        ) from None
    needed = [text for text in about.get_all("Requires-Dist") or [] if "extra ==" not in text]
    project = {"name": DISTRIBUTION, "version": about["Version"], "description": about["Summary"]}
    return (
        "[project]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in project.items())
        + f'license = {{ text = "Apache-2.0" }}\ndependencies = {json.dumps(needed)}\n\n'
        + '[tool.flwr.app]\npublisher = "fedjets"\n\n[tool.flwr.app.components]\n'
        + 'serverapp = "server_app.app:app"\nclientapp = "client_app.app:app"\n\n'
        + f"{APP_TABLE}{app_config()}"
    )


def to_toml(flat: Mapping[str, Scalar]) -> str:
    """Return dotted settings as TOML (JSON strings and numbers are valid TOML values)."""
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in flat.items())


def ended(folder: Path) -> bool:
    """Return whether the ServerApp told how the run ended."""
    return (folder / "summary.json").is_file() or (folder / "error.json").is_file()


def _text(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["text"])
    except (OSError, ValueError, KeyError):
        return "starting Flower"
