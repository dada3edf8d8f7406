"""Whole simulations on a Ray cluster of two nodes that was there before and stays there."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedjets_flwr.launch.daemons import stop_daemons
from fedjets_flwr.release import APP_ROOT, PACKAGES
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.processes import wait_until_gone
from tests.support.ray_clusters import HEAD, TwoNodes, needs_namespaces, two_nodes
from tests.support.started import finish, start

pytestmark = [pytest.mark.slow, needs_namespaces, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with two_nodes(tmp_path_factory.mktemp("ray") / "ray.log") as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", found.token)
        patch.setenv("RAY_ADDRESS", found.address)  # what `auto` means; nothing to a run on this machine
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs; the other node does not see it."""
    return tmp_path_factory.mktemp("runs")


def refusal(folder: Path, name: str, *arguments: str) -> str:
    """Return the one line that a run ends with."""
    process = start(folder, name, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, output + errors
    return errors.strip().splitlines()[-1]


def wait_for_records(process: "subprocess.Popen[str]", folder: Path, count: int) -> None:
    """Return when a run did so many rounds."""
    deadline = time.monotonic() + 240
    while len(read_metrics(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_nodes_end_with_the_bits_of_one_machine(cluster: TwoNodes, folder: Path) -> None:
    """Each is served by the transport that fits it, and what is kept on one is not expected on the other."""
    alone = finish(folder, "alone")
    spread = finish(folder, "spread", "--ray-address", cluster.address)
    assert spread["weights_hash"] == alone["weights_hash"]
    assert spread["per_client_accuracy"] == alone["per_client_accuracy"]
    assert set(alone["jobs_by_transport"]) == {"shared"}
    assert set(spread["jobs_by_transport"]) == {"inline", "shared"}
    # Where not all share memory, clients choose in an exchange of its own.
    assert sum(spread["jobs_by_transport"].values()) >= sum(alone["jobs_by_transport"].values())
    assert all(count >= 10 for count in spread["jobs_by_transport"].values())
    assert spread["wire_bytes_total"] > alone["wire_bytes_total"]
    assert "failed" not in (folder / "spread" / "run.log").read_text()
    assert cluster.alive()
    wait_until_gone(cluster.actors(), seconds=30)


def test_a_launcher_that_is_killed_leaves_the_cluster_and_nothing_in_it(cluster: TwoNodes, folder: Path) -> None:
    process = start(folder, "killed", "-c", "run.rounds=100000", "--ray-address", "auto")
    wait_for_records(process, folder / "killed", 1)
    actors = cluster.actors()
    assert len(actors) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(actors, seconds=60)
    assert cluster.alive()
    assert cluster.actors() == []


def test_a_method_whose_clients_keep_something_wants_a_folder_that_all_nodes_share(
    cluster: TwoNodes, folder: Path
) -> None:
    line = refusal(
        folder,
        "own",
        "-c",
        "strategy.name='local' partition.val-share=0.25 partition.test-share=0.25",
        "--ray-address",
        cluster.address,
    )
    assert line.startswith("error: run.cache-dir = ")
    assert "nodes of the simulation do not see this folder" in line
    wait_until_gone(cluster.actors(), seconds=30)


def test_a_wrong_token_is_named(cluster: TwoNodes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    line = refusal(folder, "stranger", "--ray-address", cluster.address)
    assert line.startswith(f"error: --ray-address {cluster.address}: the cluster refuses the token; set RAY_AUTH_MODE")
    assert cluster.alive()


def test_more_than_a_node_has_is_named(cluster: TwoNodes, folder: Path) -> None:
    line = refusal(folder, "wide", "--cpus-per-client", "2", "--ray-address", cluster.address)
    assert line == (
        "error: --cpus-per-client 2: give 1 to 1, the CPUs free on a node of the Ray cluster " + cluster.address
    )


def test_a_node_that_has_another_release_is_named(
    cluster: TwoNodes, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes have this checkout's files, and the launcher a copy of them and one file more."""
    for package in PACKAGES:
        shutil.copytree(APP_ROOT / package, tmp_path / package)
    (tmp_path / "strategies" / "more.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = refusal(folder, "newer", "--ray-address", cluster.address)
    assert f"node {HEAD} has fedjets-flwr" in line
    assert "install the same on all nodes" in line


def test_a_node_that_dies_fails_its_clients_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node takes them over."""
    with two_nodes(tmp_path / "ray.log") as cluster:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        rounds = ("-c", "run.rounds=60 limits.max-failure-share=0.9")
        process = start(tmp_path, "halved", *rounds, "--ray-address", cluster.address)
        wait_for_records(process, tmp_path / "halved", 5)
        stop_daemons([cluster.worker])
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0, output + errors
        records = read_metrics(tmp_path / "halved")
        failed = [record["round"] for record in records if record["failures"]]
        assert len(records) == 60
        assert len(failed) <= 2
        assert not records[-1]["failures"]
