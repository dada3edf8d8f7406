"""Inline and shared transport: the same bits, and nothing that a reply or a request could make them touch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.wire.transport import INLINE, SHARED, Inline, Shared, SharedFolder, Transport, probe, transport_of
from tests.test_methods import Run, run, same

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


def test_a_map_outlives_its_file_and_does_not_write_to_it(folder: SharedFolder) -> None:
    shared = Shared(folder.path, 1)
    array = shared.encode("gate", torch.ones(3))
    first, second = shared.decode("gate", array, 3), shared.decode("gate", array, 3)
    first.mul_(5)
    assert second.tolist() == [1, 1, 1]
    shared.forget("gate")
    assert second.tolist() == [1, 1, 1]
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
    folder.clear()
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
    assert folder.has_room(1)
    assert not folder.has_room(10**15)
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
