import os
from pathlib import Path

import pytest

import fedjets_flwr.launch.simulation
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.own_ray import OwnRay
from fedjets_flwr.launch.simulation import LocalFlower, Resources


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
        (Resources(cpus_per_client=3, parallel=2), 0, 1), (Resources(parallel=2), 1, 1), (Resources(parallel=2), 3, 2),
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
    ("named", "gpus", "parallel", "devices"),
    [
        (None, 4, 2, ["0,1", "2,3"]), (None, 3, 2, ["0", "1"]), (None, 2, 4, ["0", "1", "0", "1"]),
        ("5,GPU-7", 2, 2, ["5", "GPU-7"]), (None, 1, 1, [None]), (None, 0, 2, [None, None]),
    ],
)  # fmt: skip
def test_simulations_at_once_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    named: str | None,
    gpus: int,
    parallel: int,
    devices: list[str | None],
) -> None:
    """Each has a Ray that knows nothing of the others: all would begin with the first GPU."""
    with_gpus(monkeypatch, gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    _, ray = Resources(parallel=parallel).here()
    found = list[dict[str, str]]()
    for number in range(parallel):
        (tmp_path / str(number)).mkdir()
        found.append(ray.of(number).environment(tmp_path / str(number), "/usr/bin"))
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in found] == devices


def test_no_more_processes_start_than_there_are_supernodes(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    words, ray = Resources(supernodes=3, cpus_per_client=2).here()
    assert "num-supernodes=3" in words.split()
    assert ray.cpus == 6
    assert Resources(supernodes=20).here()[1].cpus == 8


def test_the_log_before_stays_beside_the_next_one(tmp_path: Path) -> None:
    """The error that ended the engine of a sweep names its log, and the next run starts another engine."""
    log = tmp_path / "flower.log"
    for text in ("first", "second"):
        flower = LocalFlower(OwnRay(1))
        flower.prepare()
        (flower.folder / "flower.log").write_text(text)
        flower.keep_log(log)
        flower.__exit__()
    assert (log.read_text(), (tmp_path / "flower.log.1").read_text()) == ("second", "first")


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
