"""What is not sent again: the server's ledger, the site's store, and both together."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.wire.messages import Job, decode_request, encode_request
from fedjets_flwr.wire.transport import Inline
from fedjets_flwr.wire.vector_cache import VectorLedger, VectorStore, versions_of

VERSION = "0123456789abcdef-1"


def test_the_same_object_keeps_its_version_and_another_one_does_not() -> None:
    ledger, vector = VectorLedger(), torch.ones(3)
    first = ledger.version("gate", vector)
    assert ledger.version("gate", vector) == first
    assert ledger.version("gate", vector.clone()) != first
    assert VectorLedger().version("gate", vector) != first  # another run


def test_a_client_lacks_what_changed_and_after_a_failure_everything() -> None:
    ledger = VectorLedger()
    ledger.sent(3, {"gate": "a", "expert.0": "a"})
    assert ledger.missing(3, {"gate": "a", "expert.0": "b", "expert.1": "a"}) == ["expert.0", "expert.1"]
    assert ledger.missing(4, {"gate": "a"}) == ["gate"]
    ledger.forget(3)
    assert ledger.missing(3, {"gate": "a"}) == ["gate"]


def test_what_came_meanwhile_can_be_taken_back() -> None:
    ledger = VectorLedger()
    ledger.sent(3, {"gate": "a"})
    before = ledger.held_by([3, 4])
    ledger.sent(3, {"gate": "b", "expert.0": "a"})
    ledger.sent(4, {"gate": "b"})
    ledger.restore(before)
    assert ledger.missing(3, {"gate": "a", "expert.0": "a"}) == ["expert.0"]
    assert ledger.missing(4, {"gate": "b"}) == ["gate"]


def test_a_store_keeps_one_version_of_each_name_and_one_run(tmp_path: Path) -> None:
    store = VectorStore(tmp_path / "vectors")
    assert store.get("gate", VERSION) is None
    vector = torch.tensor([0.1, -0.0, float("inf")])
    store.put("gate", VERSION, vector)
    store.put("expert.1", VERSION, torch.ones(2))
    kept = store.get("gate", VERSION)
    assert kept is not None
    assert torch.equal(kept.view(torch.int32), vector.view(torch.int32))
    store.put("gate", "0123456789abcdef-2", torch.zeros(3))
    assert store.get("gate", VERSION) is None
    assert store.get("expert.1", VERSION) is not None
    store.put("gate", "fedcba9876543210-1", torch.zeros(3))
    assert [path.name for path in store.folder.iterdir()] == ["gate@fedcba9876543210-1"]


def test_a_truncated_file_is_not_used(tmp_path: Path) -> None:
    store = VectorStore(tmp_path)
    store.put("gate", VERSION, torch.ones(2))
    data = (tmp_path / f"gate@{VERSION}").read_bytes()
    for at in (0, len(data) - 1):
        (tmp_path / f"gate@{VERSION}").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert store.get("gate", VERSION) is None
    for size in (7, 0, 32):
        (tmp_path / f"gate@{VERSION}").write_bytes(b"x" * size)
        assert store.get("gate", VERSION) is None


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_name_leaves_the_folder(name: str, version: str) -> None:
    store = VectorStore(Path("/nonexistent/store"))
    try:
        found = store.get(name, version)
        versions_of([f"{name}@{version}"])
    except ValueError:
        return
    assert found is None
    assert "/" not in name + version


def test_a_site_takes_from_its_store_what_does_not_come_along(tmp_path: Path) -> None:
    store, gate, expert = VectorStore(tmp_path), torch.ones(2), torch.arange(3.0)
    versions, jobs = {"gate": VERSION, "expert.0": VERSION}, [Job(1, ("expert.0", "gate"))]
    arrays = {"gate": Inline().encode("gate", gate), "expert.0": Inline().encode("expert.0", expert)}
    decode_request(encode_request(1, {}, jobs, arrays, versions), store)
    again = decode_request(encode_request(2, {}, jobs, {}, versions), store)
    assert torch.equal(again.vectors["gate"], gate)
    assert torch.equal(again.vectors["expert.0"], expert)
    store._path("gate", VERSION).unlink()
    with pytest.raises(FedjetsError, match="gate is no longer in"):
        decode_request(encode_request(2, {}, jobs, {}, versions), store)
