"""Inline and shared transport: the same bits, and nothing that a reply or a request could make them touch."""

import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.wire.transport import (
    _MAPS,
    INLINE,
    SHARED,
    Inline,
    Shared,
    SharedFolder,
    Transport,
    probe,
    transport_of,
)
from tests.support.faults import same
from tests.support.runs import Run, run

__all__ = ["run"]


@pytest.fixture
def folder() -> "SharedFolder":
    return SharedFolder()


@pytest.mark.parametrize("kind", ["inline", "shared"])
def test_a_vector_comes_back_bit_by_bit(folder: SharedFolder, kind: str) -> None:
    vector = torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45])
    transport: Transport = Inline() if kind == "inline" else Shared(folder.path, 1)
    array = transport.encode("gate", vector)
    assert same(transport.decode("gate", array, 5), vector)
    assert len(array.data) == (20 if kind == "inline" else 0)
    with pytest.raises(ValueError, match="20 bytes"):
        transport.decode("gate", array, 4)
    folder.close()


def test_a_vector_outlives_its_file(folder: SharedFolder) -> None:
    shared = Shared(folder.path, 1)
    array = shared.encode("gate", torch.ones(3))
    found = shared.decode("gate", array, 3)
    shared.path("gate").unlink()
    folder.begin({}, "float32", reuse=False)
    assert found.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="was not written"):
        shared.decode("gate", array, 3)
    folder.close()


@given(st.text(max_size=12))
def test_no_name_leaves_the_folder(name: str) -> None:
    shared = Shared(Path("/nonexistent/fedjets-1-0123456789abcdef"), 3)
    try:
        path = shared.path(name)
    except ValueError:
        return
    assert path.parent == shared.folder
    assert path.name == f"3-{name}"


def test_files_and_folder_are_private_and_gone_at_the_end(folder: SharedFolder) -> None:
    Shared(folder.path, 1).encode("gate", torch.ones(3))
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "1-gate").stat().st_mode & 0o777 == 0o600
    folder.begin({}, "float32", reuse=False)
    assert not (folder.path / "1-gate").exists()
    assert probe(str(folder.path)) == folder.token
    folder.close()
    assert not folder.path.exists()


def test_leftovers_of_dead_runs_go_and_those_of_living_ones_stay(folder: SharedFolder) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = folder.path.parent / f"fedjets-{dead.stdout.strip()}-0123456789abcdef"
    left.mkdir()
    (left / "lock").touch()
    other = SharedFolder()
    assert not left.exists()
    assert folder.path.exists()
    for each in (folder, other):
        each.close()


def test_a_client_that_still_writes_leaves_nothing_behind(folder: SharedFolder) -> None:
    done = threading.Event()

    def write() -> None:
        number = 0
        while not done.is_set():
            with suppress(OSError):
                (folder.path / f"late-{number}").touch()
            number += 1

    late = threading.Thread(target=write)
    late.start()
    time.sleep(0.05)
    folder.close()
    done.set()
    late.join()
    assert not folder.path.exists()
    assert not list(folder.path.parent.glob(f".{folder.path.name}"))


def test_a_folder_without_a_lock_goes_and_one_that_is_being_made_stays(folder: SharedFolder) -> None:
    left = folder.path.with_name("fedjets-1-0123456789abcdef")
    new = folder.path.with_name(".fedjets-1-fedcba9876543210")
    for path in (left, new):
        path.mkdir()
    SharedFolder().close()
    assert (left.exists(), new.exists()) == (False, True)
    new.rmdir()
    folder.close()


def test_a_folder_is_locked_before_others_can_find_it(folder: SharedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that starts at that moment would take it for a dead one's."""
    seen: list[set[Path]] = []
    before, lock = set(folder.path.parent.glob("fedjets-*")), fcntl.flock

    def locked(file: IO[str], how: int) -> None:
        seen.append(set(folder.path.parent.glob("fedjets-*")) - before)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    other = SharedFolder()
    assert seen[-1] == set()
    assert probe(str(other.path)) == other.token
    other.close()
    assert set(folder.path.parent.glob(".fedjets-*")) == set()


def test_a_request_cannot_name_any_folder(tmp_path: Path, folder: SharedFolder) -> None:
    assert probe(str(tmp_path)) == probe("/etc") == probe("") == ""
    with pytest.raises(ValueError, match="folder"):
        transport_of({"shared-folder": str(tmp_path), "sequence": "1"})
    assert isinstance(transport_of({}), Inline)
    assert transport_of({"shared-folder": str(folder.path), "sequence": "1"}) == Shared(folder.path, 1)
    folder.close()


def test_an_array_of_the_other_transport_is_refused(folder: SharedFolder) -> None:
    with pytest.raises(ValueError, match="not raw"):
        Inline().decode("gate", Array(dtype="float32", shape=(1,), stype=SHARED, data=b"\0" * 4), 1)
    with pytest.raises(ValueError, match="not in shared"):
        Shared(folder.path, 1).decode("gate", Array(dtype="float32", shape=(1,), stype=INLINE, data=b"\0" * 4), 1)
    folder.close()


def test_room_is_asked_for(folder: SharedFolder) -> None:
    assert folder.begin({"gate": 1}, "float32", reuse=False) is not None
    assert folder.begin({"gate": 10**15}, "float32", reuse=False) is None
    folder.close()


def test_files_that_nobody_reads_are_written_over(folder: SharedFolder) -> None:
    first = folder.begin({"gate": 12}, "float32", reuse=False)
    assert first is not None
    first.encode("gate", torch.ones(3))
    held = first.path("gate").stat().st_ino
    second = folder.begin({"expert.1": 12, "expert.2": 8}, "float32", reuse=True)
    assert second is not None
    assert not first.path("gate").exists()
    array = second.encode("expert.1", torch.arange(3.0))
    assert second.path("expert.1").stat().st_ino == held
    assert _MAPS.open(second.path("expert.1"), writable=True) is _MAPS.open(second.path("expert.1"), writable=True)
    assert second.decode("expert.1", array, 3).tolist() == [0, 1, 2]
    late = second.decode("expert.1", array, 3)
    third = folder.begin({"gate": 12}, "float32", reuse=False)  # somebody may still read
    assert third is not None
    third.encode("gate", torch.ones(3))
    assert late.tolist() == [0, 1, 2]
    folder.close()


def test_what_a_late_client_wrote_is_not_written_over(folder: SharedFolder) -> None:
    given_up = folder.begin({"3.gate": 12}, "float32", reuse=False)
    folder.begin({"3.gate": 12}, "float32", reuse=False)
    assert given_up is not None
    given_up.encode("3.gate", torch.ones(3))  # it may write on
    last = folder.begin({"3.gate": 12}, "float32", reuse=True)
    assert last is not None
    assert not given_up.path("3.gate").exists()
    assert not last.path("3.gate").exists()
    folder.close()


def test_memory_of_deleted_files_comes_free(folder: SharedFolder) -> None:
    before = shutil.disk_usage(folder.path).free
    size = 4_000_000
    shared = folder.begin({"gate": 4 * size}, "float32", reuse=False)
    assert shared is not None
    for _ in range(2):
        found = shared.decode("gate", shared.encode("gate", torch.ones(size)), size)
    assert before - shutil.disk_usage(folder.path).free > size
    del found
    folder.begin({}, "float32", reuse=False)
    assert before - shutil.disk_usage(folder.path).free < size
    folder.close()


def test_a_shorter_vector_leaves_nothing_of_a_longer_one(folder: SharedFolder) -> None:
    shared = Shared(folder.path, 1)
    shared.encode("gate", torch.ones(5))
    array = shared.encode("gate", torch.zeros(2))
    assert shared.decode("gate", array, 2).tolist() == [0, 0]
    folder.close()


@pytest.mark.parametrize("name", ["fedjets", "scaffold", "fedmix"])
def test_both_transports_give_the_same_bits(run: Run, name: str) -> None:
    inline, shared = (run(name, transport__name=kind) for kind in ("inline", "shared"))
    assert all(same(inline.vectors[key], shared.vectors[key]) for key in inline.vectors)
    there, here = inline.exchange.traffic, shared.exchange.traffic
    assert (there.down, there.up) == (here.down, here.up)
    assert there.wire > 0 == here.wire
    assert not any(str(os.getpid()) in path.name for path in Path("/dev/shm").glob("fedjets-*"))


def test_a_node_that_sees_no_shared_memory_is_not_served_another_way(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client_app.app.probe", lambda folder: "")
    with pytest.raises(FedjetsError, match="transport.name = 'shared': a SuperNode does not see"):
        run("fedavg", transport__name="shared")


def test_more_vectors_than_the_process_may_open_files_travel_all_the_same(folder: SharedFolder) -> None:
    """A cohort of 400 has 1,200 replies, and a process often 1,024 descriptors; the same files are written again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        sizes = {f"{client}.gate": 12 for client in range(400)}
        for server_round in range(3):
            shared = folder.begin(sizes, "float32", reuse=True)
            assert shared is not None
            sent = {name: torch.full((3,), float(number + server_round)) for number, name in enumerate(sizes)}
            arrays = {name: shared.encode(name, vector) for name, vector in sent.items()}
            found = {name: shared.decode(name, array, 3) for name, array in arrays.items()}
            assert all(same(found[name], vector) for name, vector in sent.items())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    folder.close()
