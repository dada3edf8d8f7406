"""One client answers badly: it alone is left out, by name, and the run ends as if its answer had never come."""

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.federation.reply_checks import bounded_mean
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.controls import CONTROLS
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.binding import fingerprint
from fedjets_flwr.wire.messages import VERSION
from tests.support.faults import (
    OneClientANode,
    Runner,
    all_weights_finite,
    clients_of,
    failures,
    same,
    same_weights,
    tampering,
)
from tests.support.in_process import Finished
from tests.support.methods import TRAINED, needed
from tests.support.sites import SiteGrid

Change = Callable[[RecordDict, int], None]
BAD_ROUND = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(
            tmp_path_factory.mktemp("bad-replies"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch
        )


def bad_client(run: Runner, kind: str, strategy: str) -> int:
    """Return the highest id among the clients that answer a message type in the bad round of a clean run."""
    return max(asked(run, kind, BAD_ROUND, strategy__name=strategy))


_seen: dict[tuple[object, ...], list[int]] = {}


def asked(run: Runner, kind: str, server_round: int, **settings: Scalar) -> list[int]:
    key = (kind, server_round, *sorted(settings.items()))
    if key not in _seen:
        found = _seen[key] = []

        def watch(message_type: str, at: int, content: RecordDict) -> None:
            if message_type.startswith(kind) and at == server_round:
                found.extend(clients_of(content))

        run(tampering(watch), **settings)
    return _seen[key]


def change_one(kind: str, client: int, change: Change, server_round: int = BAD_ROUND) -> type[OneClientANode]:
    def tamper(message_type: str, at: int, content: RecordDict) -> None:
        if message_type.startswith(kind) and at == server_round and client in clients_of(content):
            change(content, client)

    return tampering(tamper)  # type: ignore[return-value]


_without: dict[tuple[object, ...], Finished] = {}


def without(run: Runner, kind: str, client: int, **settings: Scalar) -> Finished:
    """Return a run in which Flower gives an error in place of the client's reply."""
    key = (kind, client, *sorted(settings.items()))
    if key not in _without:

        def tamper(message_type: str, at: int, content: RecordDict) -> str | None:
            hit = message_type.startswith(kind) and at == BAD_ROUND and client in clients_of(content)
            return "the node is gone" if hit else None

        _without[key] = run(tampering(tamper), **settings)
        assert failures(_without[key]) == [{}, {str(client): "the node is gone"}, {}]
    return _without[key]


# What a client can do to its answer -----------------------------------------------------------------------------------


def numbers(**values: Any) -> Change:
    """Replace numbers; None leaves one out."""

    def change(content: RecordDict, client: int) -> None:
        record = dict(content.metric_records[f"client.{client}"]) | {k.replace("_", "-"): v for k, v in values.items()}
        content[f"client.{client}"] = MetricRecord({k: v for k, v in record.items() if v is not None})

    return change


def vector(edit: Callable[[Array], Array | None], kind: str = "expert") -> Change:
    """Replace the first vector of a kind; None leaves it out."""

    def change(content: RecordDict, client: int) -> None:
        arrays = dict(content.array_records["vectors"])
        name = next(name for name in arrays if name.startswith(f"{client}.{kind}"))
        edited = edit(arrays.pop(name))
        content["vectors"] = ArrayRecord(arrays if edited is None else arrays | {name: edited})

    return change


def raw(data: bytes, array: Array, dtype: str = "float32", shape: tuple[int, ...] | None = None) -> Array:
    return Array(dtype=dtype, shape=array.shape if shape is None else shape, stype=array.stype, data=data)


def filled(value: float, kind: str = "expert") -> Change:
    return vector(lambda a: raw(struct.pack("<f", value) * (len(a.data) // 4), a), kind)


def one_value(value: float) -> Change:
    return vector(lambda a: raw(a.data[:-4] + struct.pack("<f", value), a))


def scaled(factor: float) -> Change:
    return vector(lambda a: raw((np.frombuffer(a.data, np.float32) * np.float32(factor)).tobytes(), a))


def npy_bomb(a: Array) -> Array:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000,), }"
    data = (b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header).ljust(128, b" ")
    return Array(dtype="float32", shape=(10**11,), stype="numpy.ndarray", data=data)


def rename(content: RecordDict, client: int) -> None:
    content["client.99"] = content.metric_records[f"client.{client}"]
    del content[f"client.{client}"]


def version(value: Any) -> Change:
    def change(content: RecordDict, client: int) -> None:
        content["reply"] = ConfigRecord({} if value is None else {"version": value})

    return change


def drop(name: str) -> Change:
    def change(content: RecordDict, client: int) -> None:
        del content[name]

    return change


def empty(content: RecordDict, client: int) -> None:
    for name in list(content):
        del content[name]


def reported(reason: str) -> Change:
    def change(content: RecordDict, client: int) -> None:
        content[f"error.{client}"] = ConfigRecord({"reason": reason})

    return change


def mass(edit: Callable[[list[float]], Any]) -> Change:
    def change(content: RecordDict, client: int) -> None:
        found = content.metric_records[f"client.{client}"]["mass"]
        numbers(mass=edit(list(found)))(content, client)  # type: ignore[arg-type]

    return change


LIMIT: dict[str, Scalar] = {"limits__max_update_norm": 1000.0}
WHOLE: dict[str, Scalar] = {"moe__trainable": "all", "moe__init": "random"}
OPTION_I: dict[str, Scalar] = {"scaffold__option": "I"}

TRAIN: list[Any] = [
    pytest.param("fedjets", {}, one_value(math.nan), "not finite", id="NaN"),
    pytest.param("fedavg", {}, filled(math.nan), "not finite", id="all NaN"),
    pytest.param("fedjets", {}, one_value(-math.inf), "not finite", id="Inf"),
    pytest.param("fedmix", {}, filled(math.nan, "gate"), "gate is not finite", id="NaN in the gate"),
    pytest.param("scaffold", OPTION_I, filled(math.nan, "variate"), "not finite", id="NaN variate"),
    pytest.param("fedjets", {}, vector(lambda a: raw(a.data[:-4], a)), "bytes, not", id="too short"),
    pytest.param("fedjets", {}, vector(lambda a: raw(a.data[:-1], a)), "float32", id="half a float"),
    pytest.param("fedavg", {}, vector(lambda a: raw(a.data * 2, a)), "bytes, not", id="too long"),
    pytest.param("fedavg", {}, vector(lambda a: raw(a.data[:4], a, shape=(1,))), "4 bytes", id="broadcastable"),
    pytest.param("fedjets", {}, vector(lambda a: raw(b"", a, shape=(0,))), "0 bytes", id="no bytes"),
    pytest.param("fedjets", {}, vector(lambda a: raw(a.data, a, "float64")), "float64", id="declared float64"),
    pytest.param("fedjets", {}, vector(lambda a: raw(a.data, a, "object")), "object", id="declared object"),
    pytest.param("fedjets", {}, vector(lambda a: raw(b"\0" * 128, a, shape=(10**11,))), "128 bytes", id="shape bomb"),
    pytest.param("fedjets", {}, vector(npy_bomb), "numpy.ndarray", id="header bomb"),
    pytest.param("fedjets", {}, vector(lambda a: None), "is missing", id="a vector is missing"),
    pytest.param("fedavg", {}, drop("vectors"), "is missing", id="all vectors are missing"),
    pytest.param("fedjets", {}, rename, "no part of this client", id="another client's name"),
    pytest.param("fedjets", {}, version(VERSION + 1), "version", id="another version"),
    pytest.param("fedjets", {}, version(None), "version", id="no version"),
    pytest.param("fedjets", {}, version(str(VERSION)), "version", id="version as text"),
    pytest.param("fedavg", {}, empty, "version", id="an empty reply"),
    pytest.param("fedjets", {}, numbers(num_examples=-9), "num-examples", id="-9 samples"),
    pytest.param("fedavg", {}, numbers(num_examples=10**12), "num-examples", id="1e12 samples"),
    pytest.param("fedavg", {}, numbers(num_examples=math.nan), "num-examples", id="NaN samples"),
    pytest.param("fedavg", {}, numbers(num_examples=40.0), "num-examples", id="samples as a float"),
    pytest.param("fedavg", {}, numbers(num_examples=0), "num-examples", id="0 samples"),
    pytest.param("fedavg", {}, numbers(num_examples=[40]), "num-examples", id="samples as a list"),
    pytest.param("fedavg", {}, numbers(num_examples=None), "num-examples", id="no samples"),
    pytest.param("fedjets", {}, numbers(num_examples=39), "prepared with", id="other samples than prepared"),
    pytest.param("fedjets", {}, numbers(loss=None), "loss", id="no loss"),
    pytest.param("fedjets", {}, numbers(loss=math.nan), "loss", id="NaN loss"),
    pytest.param("fedavg", {}, numbers(loss=-math.inf), "loss", id="infinite loss"),
    pytest.param("fedavg", {}, numbers(loss=[1.0]), "loss", id="loss as a list"),
    pytest.param("fedavg", LIMIT, scaled(1e6), "max-update-norm", id="a huge norm"),
    pytest.param("fedjets", LIMIT, filled(3e38), "max-update-norm", id="a norm beyond float32"),
    pytest.param("fedavg", {}, scaled(1e6), "limits.max-growth = 1000 times", id="a ruinous vector"),
    pytest.param("fedjets", {}, filled(1e30), "limits.max-growth", id="finite and ruinous"),
    pytest.param("fedmix", {}, filled(1e30, "gate"), "gate is over limits.max-growth", id="a ruinous gate"),
    pytest.param("fedavg", WHOLE, one_value(-1e-3), "a running variance is negative", id="a negative variance"),
    pytest.param("scaffold", {}, numbers(steps=1), "steps", id="other steps"),
    pytest.param("scaffold", {}, numbers(steps=0), "steps", id="no steps"),
    pytest.param("scaffold", {}, numbers(steps=None), "steps", id="steps are missing"),
    pytest.param("scaffold", {}, numbers(steps=2.0), "steps", id="steps as a float"),
    pytest.param("fedmix", {}, mass(lambda m: [-1.0, *m[1:]]), "mass", id="negative mass"),
    pytest.param("fedmix", {}, mass(lambda m: [math.nan, *m[1:]]), "mass", id="NaN mass"),
    pytest.param("fedmix", {}, mass(lambda m: [*m, 1.0]), "mass", id="mass of too many experts"),
    pytest.param("fedmix", {}, mass(lambda m: []), "mass", id="mass of no expert"),
    pytest.param("fedmix", {}, mass(lambda m: m[0]), "mass", id="mass as a number"),
    pytest.param("fedmix", {}, mass(lambda m: None), "mass", id="mass is missing"),
    pytest.param("fedmix", {}, mass(lambda m: [1e6, *m[1:]]), "mass", id="mass beyond the samples"),
    pytest.param("fedmix", {}, mass(lambda m: [1e300, *m[1:]]), "mass", id="mass beyond float32"),
    pytest.param("scaffold", OPTION_I | LIMIT, filled(1e30, "variate"), "norm", id="a huge variate"),
    pytest.param("fedjets", {}, reported("RuntimeError: out of memory"), "out of memory", id="reports an error"),
    pytest.param("ensembles", {}, one_value(math.nan), "not finite", id="NaN in an ensemble"),
    pytest.param("fedprox", {}, one_value(math.nan), "not finite", id="NaN in FedProx"),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "settings", "change", "reason"), TRAIN)
def test_a_bad_train_reply(
    run: Runner, strategy: str, settings: dict[str, Scalar], change: Change, reason: str
) -> None:
    client = bad_client(run, "train", strategy)
    found = run(change_one("train", client, change), strategy__name=strategy, **settings)
    assert all_weights_finite(found)
    before, at, after = failures(found)
    assert (before, after) == ({}, {})
    assert list(at) == [str(client)]
    assert reason in at[str(client)]
    assert same_weights(found, without(run, "train", client, strategy__name=strategy, **settings))


def add_vector(content: RecordDict, client: int) -> None:
    arrays = dict(content.array_records["vectors"])
    extra = Array(dtype="float32", shape=(1,), stype="fedjets.raw", data=b"\0\0\xc0\x7f")
    content["vectors"] = ArrayRecord(arrays | {f"{client}.expert.77": extra, "../../escape": extra})


def forge_another(content: RecordDict, client: int) -> None:
    """Reply in the name of all other clients too."""
    (array,) = [a for name, a in content.array_records["vectors"].items() if name.startswith(f"{client}.expert.0")]
    arrays = dict(content.array_records["vectors"])
    for other in set(range(12)) - {client}:
        content[f"client.{other}"] = MetricRecord({"num-examples": 40, "loss": 0.0})
        content[f"error.{other}"] = ConfigRecord({"reason": "forged"})
        arrays[f"{other}.expert.0"] = raw(struct.pack("<f", math.nan) * (len(array.data) // 4), array)
    content["vectors"] = ArrayRecord(arrays)


@pytest.mark.parametrize(
    ("strategy", "change"),
    [
        pytest.param("fedjets", add_vector, id="unknown vectors"),
        pytest.param("fedjets", numbers(accuracy=math.nan, junk=[1] * 1000), id="unknown numbers"),
        pytest.param("fedjets", vector(lambda a: raw(a.data, a, shape=(3,))), id="another declared shape"),
        pytest.param("fedavg", vector(lambda a: raw(a.data, a, shape=(10**11,))), id="a huge declared shape"),
        pytest.param("fedavg", forge_another, id="answers in the name of others"),
    ],
)
def test_what_nobody_asked_for_is_ignored(run: Runner, strategy: str, change: Change) -> None:
    client = bad_client(run, "train", strategy)
    found = run(change_one("train", client, change), strategy__name=strategy)
    assert failures(found) == [{}, {}, {}]
    clean = run(strategy__name=strategy)
    assert same_weights(found, clean)
    assert [r["loss"] for r in read_metrics(found.config.run_dir)] == [
        r["loss"] for r in read_metrics(clean.config.run_dir)
    ]


def all_huge(message_type: str, at: int, content: RecordDict) -> None:
    if message_type.startswith("train") and at == 3:
        for client in clients_of(content):
            filled(3.4e38)(content, client)


def test_finite_but_huge_experts_end_the_run_where_their_answers_are_no_numbers(run: Runner) -> None:
    """Without limits on norms: an expert that one client alone trained is as huge as that says."""
    with pytest.raises(FedjetsError, match="round 3: no unseen client answered"):
        run(tampering(all_huge), strategy__name="fedjets", limits__max_growth=0.0)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_finite_but_huge_vectors_leave_finite_weights(run: Runner, strategy: str) -> None:
    """Without limits on norms a client may send anything that float32 holds; means that overflow stay out."""
    assert all_weights_finite(run(tampering(all_huge), strategy__name=strategy, limits__max_growth=0.0))


def test_an_expert_of_a_bad_client_alone_keeps_its_bits(run: Runner) -> None:
    settings: dict[str, Scalar] = {"cohort__anchors": 2, "cohort__normals": 0, "run__rounds": 1}
    bad, good = sorted(asked(run, "train", 1, strategy__name="fedjets", **settings))
    grid = change_one("train", bad, one_value(math.nan), server_round=1)
    found = run(grid, strategy__name="fedjets", **settings)
    start = FlatModel(found.strategy.build(bad)).vector
    assert same(found.vectors[f"expert.{bad}"], start)
    assert not same(found.vectors[f"expert.{good}"], start)


@pytest.mark.parametrize(
    "experts",
    [[0, 99], [0, 5], [-1, 0], [1, 1], [0, 1, 2, 3, 4], [0.0, 1.0], [0], [], 3, None, [0, 2**62]],
    ids=str,
)
def test_bad_expert_ids(run: Runner, experts: Any) -> None:
    client = bad_client(run, "query.route", "fedjets")
    found = run(change_one("query.route", client, numbers(experts=experts)), strategy__name="fedjets")
    before, at, after = failures(found)
    assert (before, after) == ({}, {})
    assert list(at) == [str(client)]
    assert "experts" in at[str(client)]
    assert same_weights(found, without(run, "query.route", client, strategy__name="fedjets"))


def edit_list(name: str, edit: Callable[[list[int]], Any]) -> Change:
    def change(content: RecordDict, client: int) -> None:
        found: Any = content.metric_records[f"client.{client}"][name]
        numbers(**{name: edit(list(found))})(content, client)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(edit_list("answered", lambda v: [v[0] + 1, *v[1:]]), "add up", id="answered too many"),
        pytest.param(edit_list("answered", lambda v: [0] * len(v)), "add up", id="answered none"),
        pytest.param(edit_list("answered", lambda v: v[:-1]), "answered", id="answered too short"),
        pytest.param(edit_list("answered-right", lambda v: [40] * len(v)), "add up", id="more right than answered"),
        pytest.param(edit_list("answered-right", lambda v: [-1] * len(v)), "answered-right", id="negative"),
        pytest.param(edit_list("classes", lambda v: [40, *v[1:]]), "add up", id="classes"),
        pytest.param(edit_list("right", lambda v: [10**6, *v[1:]]), "right", id="more right than samples"),
        pytest.param(edit_list("right", lambda v: [40] * len(v)), "add up", id="all right, but for its own details"),
        pytest.param(edit_list("right", lambda v: [float(x) for x in v]), "right", id="right as floats"),
        pytest.param(edit_list("right", lambda v: [2**62] * len(v)), "right", id="right beyond memory"),
        pytest.param(numbers(num_examples=10**12), "num-examples", id="samples"),
        pytest.param(numbers(gate_entropy=math.nan), "gate-entropy", id="NaN entropy"),
        pytest.param(reported("ValueError: no"), "ValueError: no", id="reports an error"),
    ],
)
def test_bad_counts_of_an_unseen_client(run: Runner, change: Change, reason: str) -> None:
    found = run(change_one("evaluate", 13, change, server_round=3), strategy__name="fedjets")
    *before, at = failures(found)
    assert before == [{}, {}]
    assert list(at) == ["13"]
    assert reason in at["13"]
    evaluation = read_metrics(found.config.run_dir)[-1]["evaluation"]
    assert set(evaluation["per_client_accuracy"]) == {"12", "14"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(edit_list("right", lambda v: v[:-1]), id="too short"),
        pytest.param(edit_list("right", lambda v: [-1, *v[1:]]), id="negative"),
        pytest.param(reported("ValueError: no"), id="reports an error"),
    ],
)
def test_a_bad_inspection_is_noted(run: Runner, change: Change) -> None:
    found = run(change_one("query.inspect", 13, change, server_round=3), strategy__name="fedjets")
    assert [list(at) for at in failures(found)] == [[], [], ["13"]]


def test_an_inspection_cannot_count_more_than_there_is(run: Runner) -> None:
    change = edit_list("right", lambda v: [40] * len(v))
    found = run(change_one("query.inspect", 13, change, server_round=3), strategy__name="fedjets")
    table = read_metrics(found.config.run_dir)[-1]["inspection"]["expert_class_accuracy"]
    assert max(value for row in table for value in row if value is not None) <= 1


def one_more_right(content: RecordDict, client: int) -> None:
    """The common expert is right once more than there are samples; there are as many numbers as controls."""
    count = content.metric_records[f"client.{client}"]["num-examples"]
    edit_list("common-right", lambda v: [*v[:-1], count + 1])(content, client)


@pytest.mark.parametrize(
    ("client", "change", "reason"),
    [
        pytest.param(3, numbers(num_examples=0), "num-examples = 0", id="no samples"),
        pytest.param(3, numbers(num_examples=-1), "num-examples: expected an integer", id="negative samples"),
        pytest.param(3, numbers(num_examples=10**12), "num-examples: expected an integer", id="1e12 samples"),
        pytest.param(3, numbers(num_examples=math.nan), "num-examples: expected an integer", id="NaN samples"),
        pytest.param(3, reported("OSError: no data"), "OSError: no data", id="reports an error"),
        pytest.param(13, one_more_right, "common-right: expected values from 0 to", id="more right than samples"),
        pytest.param(
            13, edit_list("common-right", lambda v: v[:3]), f"expected {len(CONTROLS)} values", id="3 controls"
        ),
        pytest.param(13, numbers(common_right=None), "common-right: expected integers", id="no control"),
        pytest.param(13, numbers(computed=7), "computed: expected an integer from 0 to 1", id="computed 7"),
        pytest.param(13, numbers(computed=None), "computed: expected an integer", id="no computed"),
    ],
)
def test_a_client_that_prepares_badly_is_left_out(run: Runner, client: int, change: Change, reason: str) -> None:
    check_left_out(run, "fedavg", client, change, reason)


@pytest.mark.parametrize("strategy", [s for s in TRAINED if s not in {"fedavg", "ensembles"}])
def test_every_method_goes_on_without_an_unprepared_client(run: Runner, strategy: str) -> None:
    check_left_out(run, strategy, 3, reported("OSError: no data"), "OSError: no data")


def test_ensembles_go_on_without_an_unprepared_client(run: Runner) -> None:
    check_left_out(run, "ensembles", 3, reported("OSError: no data"), "OSError: no data")


def test_a_late_client_that_only_a_later_member_draws_is_prepared(run: Runner) -> None:
    """12 clients, cohorts of 9: client 3 is late, and in some round only the second member of the ensemble draws it."""
    late, asked = 3, itertools.count()

    def fail_at_first(kind: str, server_round: int, content: RecordDict) -> str | None:
        mine = kind == "query.prepare" and late in clients_of(content)
        return "OSError: no data yet" if mine and next(asked) == 0 else None

    found = run(
        tampering(fail_at_first), strategy__name="ensembles", cohort__anchors=1, cohort__normals=2, run__rounds=8
    )
    first, second = (
        [late in draw_cohort(found.config, r, "uniform", found.anchors, member).normals for r in range(1, 9)]
        for member in (0, 1)
    )
    assert second.index(True) < (first.index(True) if True in first else 8), "choose another late client"
    assert failures(found) == [{}] * 8
    assert late in found.num_samples


def check_left_out(run: Runner, strategy: str, client: int, change: Change, reason: str) -> None:
    found = run(change_one("query.prepare", client, change, server_round=0), **needed(strategy))
    assert client not in found.num_samples
    assert all_weights_finite(found)
    records = read_metrics(found.config.run_dir)
    assert [r["round"] for r in records] == [1, 2, 3]
    for record in records:
        asked = [*record["cohort"], *(found.rounds.clients.participants if "participants" in record else [])]
        part = found.config.partition
        asked += range(part.clients, part.all_clients) if "evaluation" in record else []
        assert set(record["failures"]) == {str(client)} & set(map(str, asked))
    told = {why for record in records for why in record["failures"].values()}
    assert told  # when it is wanted for its own tests alone, no reason is told
    assert all(reason in why for why in told)


WHOLE_HOST: dict[str, Any] = {
    "any-client": False, "clients": [14], "shared": "", "sees-private": False, "has-common-expert": True,
    "opted-out": False, "imitates": False,
}  # fmt: skip


class LyingHost(OneClientANode):
    """Its last node describes itself as it is told."""

    description: ConfigRecord | None = None

    def change(self, reply: Message) -> Message:
        reply = super().change(reply)
        if reply.metadata.message_type == "query.describe" and self.node == self.nodes:
            del reply.content["host"]
            if self.description is not None:
                reply.content["host"] = self.description
        return reply


def described(run: Runner, description: dict[str, Any] | None) -> Finished:
    record = None if description is None else ConfigRecord(description)
    return run(type("Grid", (LyingHost,), {"description": record}), strategy__name="fedavg", run__rounds=1)


NOT_IDS = "its clients are not ids"
ANOTHER_VERSION = "it speaks another version; install the same release"


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        pytest.param(None, ANOTHER_VERSION, id="nothing"),
        pytest.param({}, ANOTHER_VERSION, id="empty"),
        *(
            pytest.param({k: v for k, v in WHOLE_HOST.items() if k != name}, ANOTHER_VERSION, id=f"no {name}")
            for name in WHOLE_HOST
        ),
        pytest.param(WHOLE_HOST | {"clients": 3}, NOT_IDS, id="a number"),
        pytest.param(WHOLE_HOST | {"clients": "14"}, NOT_IDS, id="a text"),
        pytest.param(WHOLE_HOST | {"clients": ["x"]}, NOT_IDS, id="texts"),
        pytest.param(WHOLE_HOST | {"clients": [14.0]}, NOT_IDS, id="floats"),
        pytest.param(WHOLE_HOST | {"clients": [-1]}, NOT_IDS, id="negative"),
    ],
)
def test_a_node_that_describes_itself_badly_is_not_used(
    run: Runner, description: dict[str, Any] | None, reason: str
) -> None:
    """One field is wrong, so that the check of that field alone is what refuses it."""
    found = described(run, description)
    assert sorted(found.exchange.nodes.hosts) == list(range(1, 15))
    (record,) = read_metrics(found.config.run_dir)
    assert record["refused_nodes"] == {"node 15": reason}
    assert record["failures"] == {}


def test_a_node_that_describes_itself_whole_is_used(run: Runner) -> None:
    """What the wrong descriptions are made of is a right one."""
    found = described(run, WHOLE_HOST)
    assert sorted(found.exchange.nodes.hosts) == list(range(1, 16))
    assert found.exchange.nodes.hosts[15].clients == {14}
    assert "refused_nodes" not in read_metrics(found.config.run_dir)[0]


class ForAnyClient(SiteGrid):
    """The site of client 4 says that it runs any client, as the nodes of a simulation do."""

    def change(self, reply: Message) -> Message:
        reply = super().change(reply)
        if reply.metadata.message_type == "query.describe" and self.context.node_id == 104:
            reply.content["host"] = ConfigRecord(dict(reply.content.config_records["host"]) | {"any-client": True})
        return reply


def test_outside_a_simulation_no_site_runs_any_client(run: Runner) -> None:
    """It would be sent the models and the jobs of clients whose sites have gone."""
    found = run(ForAnyClient, run__rounds=2, run__evaluate_every=2, limits__node_seconds=0.3)
    first, second = read_metrics(found.config.run_dir)
    key = fingerprint(SiteGrid.latest.sites[104].key)
    assert first["refused_nodes"] == {key: "it claims to host any client, outside a simulation"}
    assert {*first["failures"], *second["failures"]} <= {"4"}
    assert {kind for node, kind in SiteGrid.latest.kinds if node == 104} == {"query.describe"}


def test_an_absurd_loss_of_either_sign_is_bounded() -> None:
    assert bounded_mean([1.0, 2.0, 1e150], [1, 1, 2]) == pytest.approx((1 + 2 + 2 * 20) / 4)
    assert bounded_mean([1.0, 2.0, -1e150], [1, 1, 2]) == pytest.approx((1 + 2 - 2 * 10) / 4)
