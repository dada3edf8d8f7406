"""What another user of the machine gets from a run under way: nothing. As its own user the same commands succeed."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.other_users import ASK, LIST, NOBODY, Listener, check_hung_up, listeners, needs_another_user, run_as
from tests.support.processes import descendants
from tests.support.started import start

pytestmark = [pytest.mark.slow, needs_another_user]

SUBMIT = """\
import hashlib
from pathlib import Path
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient

app = build_fab_from_disk(Path(sys.argv[3]))
become()
client = ControlHttpClient.from_server_address(sys.argv[1], True, None, [])
client.StartRun(StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)))
print("started")
"""
OVERWRITE = """\
if sys.argv[3]:
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": sys.argv[3]}
from ray._raylet import GcsClient

become()
client = GcsClient(address=sys.argv[1])
print("functions", len(client.internal_kv_keys(b"", namespace=b"fun", timeout=20)))
print("overwritten", client.internal_kv_put(b"intruder", b"code", True, namespace=b"fun", timeout=20))
"""
LOOK = """\
become()
for folder in sys.argv[1:]:
    try:
        print(os.listdir(folder))
    except PermissionError:
        print("refused")
"""
APP = """\
[project]
name = "intruder"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "intruder"
[tool.flwr.app.components]
serverapp = "intruder:server"
clientapp = "intruder:client"
"""


@dataclass(frozen=True)
class Running:
    """A `fedjets run` in its rounds.

    Attributes:
        pids: of all its processes.
    """

    pids: list[int]
    listeners: list[Listener]

    def listener(self, command: str) -> Listener:
        """Return the port of the process whose command has a word."""
        return next(listener for listener in self.listeners if command in listener.command)

    def environment(self, name: str) -> set[str]:
        """Return what a variable is in its processes."""
        pairs = (pair for pid in self.pids for pair in _environment(pid) if pair.startswith(f"{name}="))
        return {pair.partition("=")[2] for pair in pairs}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("running")
    process = start(folder, "long", "-c", "run.rounds=100000")
    try:
        metrics, deadline = folder / "long" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        pids = sorted(descendants(process.pid))
        yield Running(pids, listeners(pids))
        assert process.poll() is None  # whatever they did, it runs
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_no_process_of_a_run_listens_beyond_this_machine(running: Running) -> None:
    commands = " ".join(listener.command for listener in running.listeners)
    assert all(word in commands for word in ("flower-superlink", "gcs_server", "raylet", "ClientAppActor"))
    assert [listener for listener in running.listeners if not listener.host.is_loopback] == []


def test_another_user_cannot_list_the_runs(running: Running) -> None:
    superlink = running.listener("flower-superlink").address
    assert int(run_as(0, LIST, superlink).stdout) >= 1
    check_hung_up(run_as(NOBODY, LIST, superlink))


def test_another_user_cannot_submit_an_app(running: Running, tmp_path: Path) -> None:
    superlink = running.listener("flower-superlink").address
    (tmp_path / "pyproject.toml").write_text(APP)
    (tmp_path / "intruder.py").write_text("server = client = None\n")
    before = run_as(0, LIST, superlink).stdout
    check_hung_up(run_as(NOBODY, SUBMIT, superlink, str(tmp_path)))
    assert run_as(0, LIST, superlink).stdout == before
    assert run_as(0, SUBMIT, superlink, str(tmp_path)).stdout == "started\n"


@pytest.mark.parametrize(
    "request_line",
    [
        "GET /openapi.json", "GET /health", "POST /v1/control/list-runs", "POST /v1/runtime/acquire-task",
        "POST /v1/fleet/activate-node",
    ],
)  # fmt: skip
def test_another_user_gets_not_a_byte_of_any_api(running: Running, request_line: str) -> None:
    superlink = running.listener("flower-superlink").address
    assert run_as(0, ASK, superlink, request_line).stdout == "bytes 1\n"
    assert run_as(NOBODY, ASK, superlink, request_line).stdout == "bytes 0\n"


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["no token", "a guessed token"])
def test_another_user_cannot_overwrite_what_ray_unpickles(running: Running, token: str) -> None:
    refused = run_as(NOBODY, OVERWRITE, running.listener("gcs_server").address, token)
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert "AuthenticationError" in refused.stderr


def test_the_token_of_the_run_opens_ray(running: Running) -> None:
    """So it is the token that keeps others out."""
    (token,) = running.environment("RAY_AUTH_TOKEN")
    opened = run_as(NOBODY, OVERWRITE, running.listener("gcs_server").address, token)
    assert opened.stdout.endswith("overwritten 1\n"), opened.stderr


def test_another_user_comes_by_neither_the_token_nor_the_files_of_ray(running: Running) -> None:
    (token,), (folder,) = running.environment("RAY_AUTH_TOKEN"), running.environment("RAY_TMPDIR")
    assert not any(token in listener.command for listener in running.listeners)
    assert run_as(NOBODY, LOOK, folder, f"{folder}/ray/session_latest/sockets").stdout == "refused\n" * 2


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []
