import os

import pytest

import fedjets_flwr.launch.simulation
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.simulation import Resources


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(fedjets_flwr.launch.simulation, "gpu_count", lambda: count)


@pytest.mark.parametrize(
    ("present", "gpus", "share", "at_once"),
    [
        (0, "auto", "0", 8), (1, "auto", "0.5", 2), (2, "auto", "0.5", 4), (2, "0", "0", 8), (1, "1", "1", 1),
        (4, "0.3", "0.3", 8), (2, "0.3", "0.3", 6), (2, "2", "2", 1),
    ],
)  # fmt: skip
def test_as_many_clients_as_fit_the_gpus(
    monkeypatch: pytest.MonkeyPatch, present: int, gpus: str, share: str, at_once: int
) -> None:
    """A share of 0.3 fits a GPU three times, not ten times three GPUs."""
    with_gpus(monkeypatch, present)
    words = Resources(gpus=gpus).here()[0].split()
    assert f"num-supernodes={at_once}" in words
    assert f"client-resources-num-gpus={share}" in words
    assert f"init-args-num-cpus={at_once}" in words


@pytest.mark.parametrize("gpus", ["1", "-1", "many", "1.5", "nan", "inf"])
def test_gpus_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(FedjetsError, match=f"--gpus {gpus}: give auto"):
        Resources(gpus=gpus).here()


@pytest.mark.parametrize("cpus", [0, 9])
def test_cpus_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(FedjetsError, match=f"--cpus-per-client {cpus}: give 1 to 8"):
        Resources(cpus_per_client=cpus).here()
    words, ray = Resources(cpus_per_client=3).here()
    assert "num-supernodes=2" in words.split()
    assert ray.cpus == 6


@pytest.mark.parametrize(
    ("resources", "gpus", "at_once"),
    [
        (Resources(parallel=2), 0, 4), (Resources(parallel=3), 0, 2), (Resources(parallel=8), 0, 1),
        (Resources(cpus_per_client=3, parallel=2), 0, 1), (Resources(parallel=2), 1, 1), (Resources(parallel=2), 3, 3),
    ],
)  # fmt: skip
def test_simulations_at_once_share_the_machine(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, gpus: int, at_once: int
) -> None:
    with_gpus(monkeypatch, gpus)
    words, ray = resources.here()
    assert f"num-supernodes={at_once}" in words.split()
    assert ray.cpus == at_once * resources.cpus_per_client


@pytest.mark.parametrize(
    ("resources", "gpus", "most"),
    [
        (Resources(parallel=0), 0, 8), (Resources(parallel=-1), 0, 8), (Resources(parallel=9), 0, 8),
        (Resources(cpus_per_client=3, parallel=3), 0, 2), (Resources(parallel=3), 1, 2),
    ],
)  # fmt: skip
def test_more_simulations_than_fit_are_told(
    monkeypatch: pytest.MonkeyPatch, resources: Resources, gpus: int, most: int
) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(FedjetsError, match=f"--parallel {resources.parallel}: give 1 to {most},") as caught:
        resources.here()
    assert "\n" not in str(caught.value)
