"""Whatever a client sends, the decoder gives a sound reply or refuses it, in little memory."""

import math
import tracemalloc
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjets_flwr.printable import LONGEST
from fedjets_flwr.wire.messages import VERSION, BadReply, Reply, decode_reply
from server_app.answers import read_result

SIZES = {"expert.0": 2, "gate": 3}
INT64 = st.integers(-(2**63), 2**64 - 1)

scalars = st.one_of(INT64, st.floats(), st.just(VERSION))
lists = st.one_of(st.lists(INT64, max_size=4), st.lists(st.floats(), max_size=4))
texts = st.one_of(st.text(max_size=20), st.binary(max_size=20), st.booleans())
names = st.one_of(
    st.sampled_from(
        ["reply", "client.1", "client.2", "error.1", "vectors", "version", "reason", "1.gate", "1.expert.0"]
    ),
    st.text(max_size=10),
)
arrays = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "object", "", "<f4"]),
    shape=st.lists(st.integers(-1, 10**12), max_size=4).map(tuple),
    stype=st.sampled_from(["fedjets.raw", "numpy.ndarray", "pickle", ""]),
    data=st.one_of(st.sampled_from([b"", b"\0" * 8, b"\xff" * 8, b"\0" * 12]), st.binary(max_size=64)),
)
records = st.one_of(
    st.dictionaries(names, st.one_of(scalars, lists), max_size=4).map(MetricRecord),
    st.dictionaries(names, st.one_of(scalars, lists, texts), max_size=4).map(ConfigRecord),
    st.dictionaries(names, arrays, max_size=4).map(ArrayRecord),
)
anything = st.dictionaries(names, records, max_size=6).map(RecordDict)


def plausible(head: Any, numbers: Any, vectors: Any, error: Any) -> RecordDict:
    """A reply of the right form, so that the checks behind the first one are met too."""
    content = RecordDict({"reply": ConfigRecord(head), "client.1": MetricRecord(numbers)})
    content["vectors"] = ArrayRecord(vectors)
    if error is not None:
        content["error.1"] = ConfigRecord(error)
    return content


nearly = st.builds(
    plausible,
    st.just({"version": VERSION}),
    st.dictionaries(st.sampled_from(["loss", "num-examples", "experts"]), st.one_of(scalars, lists), max_size=3),
    st.dictionaries(st.sampled_from(["1.gate", "1.expert.0", "2.gate"]), arrays, max_size=3),
    st.one_of(st.none(), st.dictionaries(st.just("reason"), st.one_of(scalars, lists, texts), max_size=1)),
)


def check(content: RecordDict) -> None:
    try:
        reply = decode_reply(content, 1, SIZES)
    except BadReply as error:
        assert 0 < len(str(error)) < 1000
        return
    assert reply.client == 1
    if reply.error:
        assert (reply.vectors, reply.numbers, reply.bytes_up) == ({}, {}, 0)
        assert isinstance(reply.error, str)
        assert len(reply.error) <= 2000
        return
    assert {name: vector.numel() for name, vector in reply.vectors.items()} == SIZES
    assert all(vector.dtype == torch.float32 for vector in reply.vectors.values())
    assert reply.bytes_up == 20
    read(reply)


def read(reply: Reply) -> None:
    """Every accessor gives what it says, or refuses."""
    for name in [*reply.numbers, "absent"]:
        try:
            assert math.isfinite(reply.number(name))
        except BadReply as error:
            assert name in str(error)
        try:
            count = reply.count(name, 40)
            assert isinstance(count, int)
            assert 0 <= count <= 40
        except BadReply as error:
            assert name in str(error)
        try:
            found = reply.integers(name, 2, 4)
            assert len(found) == 2
            assert all(isinstance(v, int) and 0 <= v <= 4 for v in found)
        except BadReply as error:
            assert name in str(error)


@given(anything)
def test_any_records(content: RecordDict) -> None:
    check(content)


@given(nearly)
@settings(max_examples=300)
def test_records_of_nearly_the_right_form(content: RecordDict) -> None:
    check(content)


COUNTS = ("num-examples", "answered", "answered-right", "classes", "right", "gate-entropy")
small = st.one_of(
    st.lists(st.integers(-1, 6), min_size=4, max_size=4), st.lists(st.integers(0, 3), min_size=2, max_size=2)
)


@given(st.dictionaries(st.sampled_from(COUNTS), st.one_of(scalars, lists, small, st.integers(0, 6)), max_size=6))
@settings(max_examples=300)
def test_any_counts_of_an_unseen_client(numbers: dict[str, Any]) -> None:
    try:
        found = read_result(Reply(1, {}, numbers), (0, 3), 6, 2, 100)
    except BadReply:
        return
    assert int(found.classes.sum()) == found.samples == 6
    assert torch.equal(found.answered.sum(dim=0), found.classes)
    assert bool((found.answered_right <= found.answered).all())
    assert math.isfinite(found.gate_entropy)
    assert all(0 <= count <= 6 for count in found.right)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["large", "small"])
def test_a_number_is_one_that_a_float_holds(value: int) -> None:
    with pytest.raises(BadReply, match="loss"):
        Reply(1, {}, {"loss": value}).number("loss")


def peak_of(content: RecordDict) -> int:
    tracemalloc.start()
    try:
        check(content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMB = Array(dtype="float32", shape=(10**11,), stype="numpy.ndarray", data=b"\x93NUMPY".ljust(128))


def test_memory_stays_small() -> None:
    """Neither a declared shape nor a payload of the wrong length makes the decoder allocate."""
    payload = b"\0" * (1 << 25)
    for array in (BOMB, Array("float32", (2,), "fedjets.raw", payload), Array("float64", (2,), "x", payload)):
        content = plausible({"version": VERSION}, {"loss": 1.0}, {"1.expert.0": array, "1.gate": array}, None)
        assert peak_of(content) < 1 << 20


def test_vectors_that_nobody_asked_for_stay_undecoded() -> None:
    payload = Array("float32", (1 << 23,), "fedjets.raw", b"\0" * (1 << 25))
    good = {"1.expert.0": Array("float32", (2,), "x", b"\0" * 8), "1.gate": Array("float32", (3,), "x", b"\0" * 12)}
    content = plausible({"version": VERSION}, {"loss": 1.0}, good | {f"1.expert.{m}": payload for m in (1, 2)}, None)
    assert peak_of(content) < 1 << 20


def test_a_long_reason_is_cut() -> None:
    content = plausible({"version": VERSION}, {}, {}, {"reason": "x" * 10**6})
    assert len(decode_reply(content, 1, SIZES).error) == LONGEST
