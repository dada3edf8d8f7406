"""Room on a Ray cluster, and why there is none; clusters that run are in ``tests/end_to_end/test_ray_cluster.py``."""

import os
import socket
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import ray
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch import ray_cluster
from fedjets_flwr.launch.own_ray import OwnRay
from fedjets_flwr.launch.ray_actors import PlacedActors
from fedjets_flwr.launch.ray_cluster import Placement, RayCluster, RayNode, find_cluster, interleaved
from fedjets_flwr.launch.ray_survey import installed
from fedjets_flwr.launch.simulation import LocalFlower, Resources
from fedjets_flwr.launch.stand_in import COMMAND

HERE = {"fedjets-flwr": "0.1.0 (abc)", "torch": "2.10.0"}


def cluster(*rooms: tuple[float, float]) -> RayCluster:
    """Return one of nodes a, b, … with so many free CPUs and GPUs."""
    nodes = (RayNode(name, name, *room) for name, room in zip("abcdef", rooms, strict=False))
    return RayCluster("10.0.0.1:6379", tuple(nodes))


@pytest.mark.parametrize(
    ("rooms", "resources", "nodes"),
    [
        ([(2, 0), (3, 0)], Resources(), "ababb"),
        ([(2, 0), (3, 0)], Resources(supernodes=3), "aba"),
        ([(2, 0), (1, 0)], Resources(supernodes=50), "aba"),
        ([(3.5, 0), (5, 0)], Resources(cpus_per_client=2), "abb"),
        ([(8, 0), (8, 1), (8, 2)], Resources(), "bcbccc"),
        ([(8, 0), (8, 1)], Resources(gpus="0"), "ab" * 8),
        ([(8, 1), (8, 2)], Resources(gpus="2"), "b"),
        ([(0, 0), (1, 0)], Resources(), "b"),
    ],
)
def test_as_many_clients_as_fit_each_node(rooms: list[tuple[float, float]], resources: Resources, nodes: str) -> None:
    """The first few are on as many nodes as can be."""
    federation, placement = resources.on(cluster(*rooms))
    assert "".join(placement.nodes) == nodes
    assert f"num-supernodes={resources.supernodes or len(nodes)}" in federation.split()
    assert "init-args-num-cpus" not in federation  # Ray takes none for a cluster that runs


@pytest.mark.parametrize(
    ("rooms", "resources", "words"),
    [
        ([(0, 4), (0.5, 0)], Resources(), "--ray-address: no CPU is free on a node of the Ray cluster 10.0.0.1:6379"),
        ([(2, 0), (4, 0)], Resources(cpus_per_client=5), "--cpus-per-client 5: give 1 to 4, the CPUs free on a node"),
        ([(2, 0), (2, 1)], Resources(gpus="2"), "--gpus 2: give .* up to 1, the GPUs free on a node"),
        ([(8, 0), (1, 1)], Resources(cpus_per_client=2, gpus="1"), "--cpus-per-client 2 and --gpus 1 are not both"),
        ([(8, 0)], Resources(supernodes=-1), "--supernodes -1: give 1 or more"),
    ],
)
def test_what_fits_no_node_is_named(rooms: list[tuple[float, float]], resources: Resources, words: str) -> None:
    with pytest.raises(FedjetsError, match=words):
        resources.on(cluster(*rooms))


def test_nodes_take_turns() -> None:
    assert interleaved(["a", "b", "c"], [1, 0, 3]) == ("a", "c", "c", "c")


@pytest.mark.parametrize("address", ["", "10.0.0.1", "ray://10.0.0.1:10001", "local", "host:99999", "a b:1"])
def test_what_is_no_address_is_named(address: str) -> None:
    with pytest.raises(FedjetsError, match=r"--ray-address .*: give HOST:PORT"):
        find_cluster(address)


def test_nothing_that_answers_is_told_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(FedjetsError, match=r"nothing answers there .*; start a cluster with `ray start --head`"):
            find_cluster(f"127.0.0.1:{unused.getsockname()[1]}")


@pytest.mark.parametrize(
    ("printed", "logged", "words"),
    [
        ('{"error": "ConnectionError: Failed"}', "RPC error: InvalidAuthToken: …", "refuses the token; set RAY_AUTH_M"),
        ('{"error": "AuthenticationError: no token"}', "", "refuses the token; set RAY_AUTH_MODE=token"),
        ('{"error": "RuntimeError: No node info found"}', "", "this machine is no node of the cluster; `ray start"),
        ('{"error": "ConnectionError: Could not find any running Ray instance."}', "", "no Ray runs on this machine"),
        ('{"error": "RuntimeError: Version mismatch:\\n Ray: 2.9"}', "", "mismatch: Ray: 2.9; run `fedjets` with the"),
        ('{"error": "ValueError: what"}', "", "Ray does not let us in: ValueError: what"),
        ("", "one\ncore dumped", "Ray does not let us in: core dumped"),
        ('{"here": {}, "nodes": []}', "", "no node of the cluster is alive"),
    ],
)
def test_why_ray_lets_nobody_in_is_one_line_with_the_mend(
    monkeypatch: pytest.MonkeyPatch, printed: str, logged: str, words: str
) -> None:
    done = subprocess.CompletedProcess([], 0, printed, logged)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(FedjetsError, match=words) as caught:
        find_cluster("auto")
    assert str(caught.value).startswith("--ray-address auto: ")
    assert "\n" not in str(caught.value)


def test_a_cluster_that_keeps_us_waiting_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("ray", 1)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(FedjetsError, match="--ray-address auto: Ray does not let us in: no answer within 180 s"):
        find_cluster("auto")


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({}, r"node b has fedjets-flwr none, and 0\.1\.0 \(abc\) is here"),
        (HERE | {"torch": "2.9.0"}, r"node b has torch 2\.9\.0, and 2\.10\.0 is here; install the same on all nodes"),
    ],
)
def test_a_node_with_another_release_is_named(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, str], words: str
) -> None:
    nodes = [{"name": n, "host": n, "cpus": 1.0, "gpus": 0.0, "installed": HERE} for n in "ab"]
    found: dict[str, Any] = {"address": "10.0.0.1:6379", "here": HERE, "nodes": nodes}
    monkeypatch.setattr(ray_cluster, "_survey", lambda address: found)
    assert find_cluster("auto") == cluster((1, 0), (1, 0))
    nodes[1]["installed"] = there
    with pytest.raises(FedjetsError, match=words):
        find_cluster("auto")


def test_the_build_of_a_version_is_not_compared() -> None:
    """A head without a GPU has another build of torch than its workers."""
    assert all("+" not in version for version in installed().values())
    assert installed()["fedjets-flwr"].startswith("0.")


def test_the_stand_in_comes_before_flowers_own_command(tmp_path: Path) -> None:
    found = Placement("10.0.0.1:6379", ("a", "b")).environment(tmp_path, "/usr/bin")
    first, last = found["PATH"].split(":")
    assert (found["RAY_ADDRESS"], last) == ("10.0.0.1:6379", "/usr/bin")
    assert COMMAND in TASK_TYPE_TO_COMMAND.values()
    done = subprocess.run([Path(first) / COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert "Run a Flower Simulation" in done.stdout


def test_a_folder_from_which_no_command_runs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower would find its own command further down the path."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FedjetsError, match="noexec.*; set TMPDIR"):
        Placement("10.0.0.1:6379", ("a",)).environment(tmp_path, "/usr/bin")


def test_a_run_on_this_machine_starts_a_ray_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert LocalFlower(OwnRay(1)).switches(tmp_path / "flwr")["RAY_ADDRESS"] == "local"


def test_a_run_on_a_cluster_brings_the_users_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ours")
    found = LocalFlower(Placement("10.0.0.1:6379", ("a",))).switches(tmp_path / "flwr")
    assert found["RAY_AUTH_TOKEN"] == "ours"
    assert "RAY_TMPDIR" not in found


class Actor:
    """Stands in for the handle of a Ray actor, and for what makes one."""

    def __init__(self, node: str = "") -> None:
        self.node = node
        self.__ray_ready__ = self

    def options(self, scheduling_strategy: Any, **resources: float) -> "Actor":
        assert resources == {"num_cpus": 1}
        assert not scheduling_strategy.soft
        return Actor(scheduling_strategy.node_id)

    def remote(self) -> "Actor":
        return self


NODES = ["a" * 56, "b" * 56]


def test_a_supernode_is_always_served_from_the_same_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda future: ("0", "reply", "context"))
    killed: list[Actor] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    pool = PlacedActors(NODES, Actor(), {"num_cpus": 1}, {})
    assert not pool.is_actor_available()
    pool.add_actors_to_pool(pool.actors_capacity)
    assert (pool.num_actors, pool.is_actor_available()) == (2, True)
    for _ in range(2):  # the second time the actor is busy
        served = [pool.submit(lambda actor, *_: actor.node, (None, None, str(i), None)) for i in range(4)]
        assert served == [*NODES, *NODES]
    assert pool.fetch_result_and_return_actor_to_pool("future") == ("reply", "context")
    pool.terminate_all_actors()
    assert [actor.node for actor in killed] == NODES


def test_room_that_was_taken_meanwhile_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (refs[:1], refs[1:]))
    pool = PlacedActors(NODES, Actor(), {"num_cpus": 1}, {})
    with pytest.raises(RuntimeError, match="1 of 2 clients' processes do not run after 100 s"):
        pool.add_actors_to_pool(2)


def test_nodes_are_told_the_folders_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs is that of `ray start`. A setting counts before it, and one's own images are no data set that all have."""
    there, here = Placement("10.0.0.1:6379", ("a",)), OwnRay(1)
    config = Config.from_flat({"data.name": "cifar10"})
    monkeypatch.delenv("FEDJETS_CACHE", raising=False)
    monkeypatch.delenv("FEDJETS_DATA", raising=False)
    assert there.told(config) == here.told(config) == config.flat()
    monkeypatch.setenv("FEDJETS_CACHE", "/shared/cache")
    monkeypatch.setenv("FEDJETS_DATA", "/shared/data")
    assert there.told(config) == config.flat() | {"run.cache-dir": "/shared/cache", "data.dir": "/shared/data"}
    assert here.told(config) == config.flat()
    named = Config.from_flat({"data.name": "cifar10", "data.dir": "/own", "run.cache-dir": "/kept"})
    assert there.told(named) == named.flat()
    images = Config.from_flat({"data.name": "image-folder", "data.classes": "cat,dog"})
    assert there.told(images)["data.dir"] == ""


def test_a_node_without_a_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception there would fail the survey of all nodes, and name none."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fedjets_flwr.launch.ray_survey.version", missing)
    assert installed()["torch"] == "none"
