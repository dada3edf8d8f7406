import contextlib
import math
import time
from collections.abc import Callable

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.wire.messages import (
    VERSION,
    BadReply,
    Job,
    Reply,
    decode_reply,
    decode_request,
    encode_replies,
    encode_request,
)
from fedjets_flwr.wire.nodes import last_line
from fedjets_flwr.wire.transport import INLINE, Inline

FORGED = "x\n\x1b[2KINFO: all is well\r" + "y" * 9000
"""Words that would write a log line of their own, and hide the one that they are in."""
VECTORS = {"expert.0": torch.arange(3.0), "expert.1": torch.tensor([-0.0, 1e-45, 3e38]), "gate": torch.ones(2)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def request() -> RecordDict:
    jobs = [
        Job(3, ("expert.0", "gate"), ("expert.0", "gate"), {"anchor": 0}),
        Job(7, ("expert.0", "expert.1", "gate")),
        Job(9),
    ]
    vectors = VECTORS | {"expert.2": torch.zeros(9)}
    return encode_request(4, {"layout": "abc"}, jobs, {n: Inline().encode(n, v) for n, v in vectors.items()})


def test_request_round_trip() -> None:
    found = decode_request(request())
    assert (found.server_round, found.facts) == (4, {"layout": "abc"})
    assert [(job.client, job.vectors, dict(job.numbers)) for job in found.jobs] == [
        (3, ("expert.0", "gate"), {"anchor": 0}),
        (7, ("expert.0", "expert.1", "gate"), {}),
        (9, (), {}),
    ]
    assert set(found.vectors) == set(VECTORS)
    assert all(same_bits(found.vectors[name], vector) for name, vector in VECTORS.items())


def test_a_message_of_many_clients_is_read_in_linear_time() -> None:
    def seconds(clients: int) -> float:
        asked = encode_request(1, {}, [Job(client) for client in range(clients)], {})
        reply = encode_replies(Reply(client, {}, {"num-examples": 1}) for client in range(clients))
        begun = time.perf_counter()
        decode_request(asked)
        for client in range(clients):
            decode_reply(reply, client, {})
        return time.perf_counter() - begun

    few, many = (min(seconds(clients) for _ in range(3)) for clients in (250, 2000))
    assert many < 24 * few  # 8 if linear, 64 if every client looks at all the others


def test_a_vector_travels_once_and_only_if_a_job_names_it() -> None:
    arrays = request().array_records["vectors"]
    assert sorted(arrays) == ["expert.0", "expert.1", "gate"]
    assert sum(len(array.data) for array in arrays.values()) == 4 * (3 + 3 + 2)


def test_a_request_of_another_version_is_refused() -> None:
    content = request()
    content["request"] = ConfigRecord(dict(content.config_records["request"]) | {"version": VERSION + 1})
    with pytest.raises(FedjetsError, match="version"):
        decode_request(content)


def reply() -> RecordDict:
    good = Reply(3, {"expert.0": VECTORS["expert.0"], "gate": VECTORS["gate"]}, {"loss": 0.5, "experts": [1, 0]})
    return encode_replies([good, Reply(7, {}, {}, error="RuntimeError: out of memory"), Reply(9, {}, {"n": 4})])


SIZES = {"expert.0": 3, "gate": 2}


def test_reply_round_trip() -> None:
    found = decode_reply(reply(), 3, SIZES)
    assert (found.client, found.error, found.bytes_up) == (3, "", 4 * 5)
    assert found.numbers == {"loss": 0.5, "experts": [1, 0]}
    assert set(found.vectors) == set(SIZES)
    assert all(same_bits(found.vectors[name], VECTORS[name]) for name in SIZES)
    assert decode_reply(reply(), 9, {}).numbers == {"n": 4}


def test_an_error_is_passed_on() -> None:
    found = decode_reply(reply(), 7, SIZES)
    assert found.error == "RuntimeError: out of memory"
    assert (found.vectors, found.numbers, found.bytes_up) == ({}, {}, 0)


def test_a_reply_of_another_version_is_refused() -> None:
    for head in (ConfigRecord({"version": VERSION + 1}), ConfigRecord({}), None):
        content = reply()
        del content["reply"]
        if head is not None:
            content["reply"] = head
        with pytest.raises(BadReply, match="version"):
            decode_reply(content, 3, SIZES)


@pytest.mark.parametrize(
    ("client", "expected", "reason"),
    [
        (4, SIZES, "no part of this client"),
        (3, SIZES | {"expert.5": 3}, "expert.5 is missing"),
        (9, SIZES, "expert.0 is missing"),
        (3, {"expert.0": 4}, "expert.0 has 12 bytes, not 16"),
        (3, {"gate": 1}, "gate has 8 bytes"),
    ],
)
def test_what_is_missing_or_of_another_size_is_refused(client: int, expected: dict[str, int], reason: str) -> None:
    with pytest.raises(BadReply, match=reason):
        decode_reply(reply(), client, expected)


def with_array(array: Array) -> RecordDict:
    content = encode_replies([Reply(1, {}, {"loss": 1.0})])
    content["vectors"] = ArrayRecord({"1.gate": array})
    return content


def test_another_type_of_the_right_length_is_refused() -> None:
    for dtype in ("float64", "int32", "float16", ">f4"):
        with pytest.raises(BadReply, match=dtype):
            decode_reply(with_array(Array(dtype=dtype, shape=(2,), stype=INLINE, data=b"\0" * 8)), 1, {"gate": 2})


@given(
    st.binary(max_size=40),
    st.sampled_from(["float32", "float64", "object", "", "garbage"]),
    st.lists(st.integers(-3, 1000), max_size=3),
    st.integers(1, 8),
)
def test_whatever_bytes_come_are_decoded_or_refused(data: bytes, dtype: str, shape: list[int], size: int) -> None:
    content = with_array(Array(dtype=dtype, shape=tuple(shape), stype=INLINE, data=data))
    if dtype == "float32" and len(data) == 4 * size:
        found = decode_reply(content, 1, {"gate": size}).vectors["gate"]
        assert found.numpy().tobytes() == data
    else:
        with pytest.raises(BadReply):
            decode_reply(content, 1, {"gate": size})


values = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(-5, 5), max_size=3),
    st.lists(st.floats(), max_size=3),
)


@given(st.dictionaries(st.sampled_from(["a", "b"]), values))
def test_numbers_are_read_or_refused(numbers: dict[str, int | float | list[int] | list[float]]) -> None:
    content = encode_replies([Reply(1, {}, {})])
    content["client.1"] = MetricRecord(numbers)
    reply = decode_reply(content, 1, {})
    with contextlib.suppress(BadReply):
        assert math.isfinite(reply.number("a"))
    with contextlib.suppress(BadReply):
        found = reply.integers("b", 2)
        assert len(found) == 2
        assert all(isinstance(value, int) for value in found)


@pytest.mark.parametrize("value", [math.nan, math.inf, [1], None])
def test_a_number_must_be_finite(value: float | None) -> None:
    with pytest.raises(BadReply, match="loss"):
        Reply(1, {}, {} if value is None else {"loss": value}).number("loss")


@pytest.mark.parametrize("value", [3, [1.0, 2.0], [1], None])
def test_integers_must_be_as_many_as_wanted(value: int | None) -> None:
    with pytest.raises(BadReply, match="experts"):
        Reply(1, {}, {} if value is None else {"experts": value}).integers("experts", 2)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_a_vector_keeps_its_bits(floats: list[float]) -> None:
    vector = torch.tensor(floats)
    array = Inline().encode("gate", vector)
    assert len(array.data) == 4 * len(floats)
    assert same_bits(Inline().decode("gate", array), vector)


def forged_type() -> str:
    array = Array(FORGED, (3,), INLINE, b"")
    content = RecordDict({"reply": ConfigRecord({"version": VERSION}), "client.1": MetricRecord({})})
    content["vectors"] = ArrayRecord({"1.gate": array})
    with pytest.raises(BadReply) as refused:
        decode_reply(content, 1, {"gate": 3})
    return str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        lambda: decode_reply(encode_replies([Reply(1, {}, {}, error=FORGED)]), 1, {}).error,
        lambda: last_line(FORGED),
        forged_type,
    ],
    ids=["its error", "its crash", "an array's type"],
)
def test_the_words_of_a_reply_are_one_printable_line_of_bounded_length(words: Callable[[], str]) -> None:
    assert words().isprintable()
    assert 0 < len(words()) <= 500
