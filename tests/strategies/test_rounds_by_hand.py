"""Whole runs of every method, through the real apps, against the same rounds computed by hand in float64."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.moe.controls import CONTROLS
from fedjets_flwr.moe.metrics import PRIORS, READINGS
from fedjets_flwr.runs.tracking import read_metrics
from server_app.outcome import facts_of
from tests.support import by_hand
from tests.support.by_hand import Array, Client, Vectors
from tests.support.in_process import Finished
from tests.support.runs import ROUNDS, TinyRunner
from tests.support.tiny import CLASSES, EXPERTS, common_expert, samples_of

UNSEEN = (7, 8)
COUNTED = tuple(reading for reading in READINGS if not reading.startswith("familiar"))
"""Of what no client was asked for."""


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    return TinyRunner(tmp_path, monkeypatch)


@dataclass
class Reply:
    """What a client returns: vectors, each with its weight in the average."""

    client: int
    vectors: Vectors
    loss: float
    weights: Mapping[str, float] = field(default_factory=dict)


def state_of(method: Finished) -> Vectors:
    return {name: vector.double().numpy() for name, vector in method.vectors.items()}


def averaged(config: Config, replies: Sequence[Reply]) -> Vectors:
    """Return sum_s w_s v_s / sum_s w_s of each vector over those who returned it; w_s = N_s unless the reply says."""
    sums: Vectors = {}
    totals: dict[str, float] = {}
    for reply in replies:
        for name, vector in reply.vectors.items():
            weight = reply.weights.get(name, len(samples_of(config, reply.client)))
            sums[name] = sums.get(name, np.zeros(1)) + weight * vector
            totals[name] = totals.get(name, 0.0) + weight
    return {name: total / totals[name] for name, total in sums.items()}


def chosen(gate: Array, h: Array, k: int) -> list[int]:
    """Return TOPK(sum_i g(x_i))."""
    return [int(m) for m in np.argsort(-by_hand.scores(gate, h).sum(axis=0))[:k]]


def fedavg(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    clients = draw_cohort(config, server_round, "uniform", ()).normals
    return [Reply(c, *Client(config, c, server_round).supervised(state)) for c in clients]


def fedprox(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    clients = draw_cohort(config, server_round, "uniform", ()).normals
    return [Reply(c, *Client(config, c, server_round).proximal(state, config.fedprox.mu)) for c in clients]


def ensembles(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    replies: dict[int, list[tuple[Vectors, float]]] = {}
    for member in range(config.ensembles.members):
        for c in draw_cohort(config, server_round, "uniform", (), member).normals:
            replies.setdefault(c, []).append(Client(config, c, server_round).supervised(state, member))
    return [
        Reply(c, dict(pair for vectors, _ in held for pair in vectors.items()), float(np.mean([x for _, x in held])))
        for c, held in sorted(replies.items())
    ]


def fedmix(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    replies = []
    for c in draw_cohort(config, server_round, "uniform", ()).normals:
        client = Client(config, c, server_round)
        vectors, loss = client.normal(state, range(EXPERTS), "probs")
        mass = by_hand.scores(vectors["gate"], client.samples.h).sum(axis=0)
        replies.append(Reply(c, vectors, loss, {f"expert.{m}": mass[m] for m in range(EXPERTS)}))
    return replies


def fedjets(config: Config, state: Vectors, server_round: int, bound: Sequence[int] = (0, 1, 2)) -> list[Reply]:
    cohort = draw_cohort(config, server_round, config.cohort.sampling or "anchored", bound)
    replies = []
    for c in cohort.anchors:
        m = bound.index(c)
        sent = {name: state[name] for name in (f"expert.{m}", "gate")}
        replies.append(Reply(c, *Client(config, c, server_round).anchor(sent, m)))
    for c in cohort.normals:
        client = Client(config, c, server_round)
        oracle = one_hot(config, c) if config.gate.mode == "oracle" else None
        ids = chosen(state["gate"], client.samples.h, config.moe.top_k) if oracle is None else best(oracle, config)
        sent = {name: state[name] for name in (*(f"expert.{m}" for m in ids), "gate")}
        replies.append(Reply(c, *client.normal(sent, ids, "logits", oracle)))
    learners = cohort.anchors if config.gate.learns_from == "anchors" else cohort.clients
    for reply in replies:
        if config.gate.mode != "learned" or reply.client not in learners:
            reply.vectors.pop("gate")
    return sorted(replies, key=lambda reply: reply.client)


def one_hot(config: Config, client: int) -> Array:
    """Return an oracle's scores: 1 for the expert whose anchor holds most samples of a label."""
    held = np.stack([np.bincount(samples_of(config, m).y, minlength=CLASSES) for m in range(EXPERTS)])
    scores: Array = np.eye(EXPERTS)[held.argmax(axis=0)[samples_of(config, client).y]]
    return scores


def best(scores: Array, config: Config) -> list[int]:
    return [int(m) for m in np.argsort(-scores.sum(axis=0), kind="stable")[: config.moe.top_k]]


def scaffold(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    """The model's replies; the variates of ``state`` move along: c_i+ = c_i - c + (x - y) / (K lr), option II."""
    replies, old = [], dict(state)
    for c in draw_cohort(config, server_round, "uniform", ()).normals:
        client, own = Client(config, c, server_round), old.get(f"variate.{c}", np.zeros_like(old["variate"]))
        vectors, loss = client.scaffold({"expert.0": old["expert.0"]}, old["variate"] - own)
        m, steps = config.train.momentum, range(1, len(client.batches(0)) + 1)
        moved = client.rate.lr * sum((1 - m**j) / (1 - m) for j in steps)
        new = own - old["variate"] + (old["expert.0"] - vectors["expert.0"]) / moved
        state[f"variate.{c}"] = new
        state["variate"] = state["variate"] + (new - own) / config.partition.clients
        replies.append(Reply(c, vectors, loss, {"expert.0": 1.0}))  # plain means, as of the variates
    return replies


def ifca(config: Config, state: Vectors, server_round: int, **_: Any) -> list[Reply]:
    cohort, replies = draw_cohort(config, server_round, config.cohort.sampling or "uniform", (0, 1, 2)), []
    for c in cohort.clients:
        client = Client(config, c, server_round)
        best = min(range(EXPERTS), key=lambda m: client.loss(state[f"expert.{m}"])) if c in cohort.normals else c
        replies.append(Reply(c, *client.supervised({f"expert.{best}": state[f"expert.{best}"]}, best)))
    return replies


METHODS = {
    "ensembles": ensembles, "fedavg": fedavg, "fedjets": fedjets, "fedmix": fedmix, "fedprox": fedprox, "ifca": ifca,
    "scaffold": scaffold,
}  # fmt: skip


def by_rounds(method: Finished, **more: Any) -> Iterator[tuple[list[Reply], Vectors]]:
    """Yield each round's replies, and the state after it."""
    state = state_of_start(method)
    for server_round in range(1, ROUNDS + 1):
        replies = METHODS[method.config.strategy.name](method.config, state, server_round, **more)
        state |= averaged(method.config, replies)
        yield replies, dict(state)


def state_of_start(method: Finished) -> Vectors:
    return {name: vector.double().numpy() for name, vector in method.strategy.state().items()}


def assert_follows(method: Finished, **more: Any) -> Vectors:
    """Compare losses, cohorts, counts and the last state with the rounds by hand; return that state."""
    records = read_metrics(method.config.run_dir)
    state: Vectors = {}
    for record, (replies, after) in zip(records, by_rounds(method, **more), strict=True):
        state = after
        samples = {r.client: len(samples_of(method.config, r.client)) for r in replies}
        assert record["cohort"] == list(samples)
        loss = sum(samples[r.client] * r.loss for r in replies) / sum(samples.values())
        assert record["loss"] == pytest.approx(loss, abs=1e-4)
        names = [name for r in replies for name in r.vectors]
        assert record["trained"] == {name: names.count(name) for name in names}
    found = state_of(method)
    assert found.keys() == state.keys()
    for name, vector in found.items():
        np.testing.assert_allclose(vector, state[name], atol=1e-4, err_msg=name)
    return state


@pytest.mark.parametrize("name", list(METHODS))
def test_rounds_are_those_by_hand(tiny_run: TinyRunner, name: str) -> None:
    assert_follows(tiny_run(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort__sampling": "uniform"},
        {"gate__mode": "random"},
        {"gate__mode": "oracle"},
        {"gate__learns_from": "anchors"},
        {"train__logit_adjust": True, "moe__renormalise": True},
    ],
)  # fmt: skip
def test_rounds_of_fedjets_in_other_ways(tiny_run: TinyRunner, changes: dict[str, Scalar]) -> None:
    assert_follows(tiny_run("fedjets", **changes))


def test_anchors_of_ifca_train_the_model_that_they_are_bound_to(tiny_run: TinyRunner) -> None:
    method = tiny_run("ifca", cohort__sampling="anchored", train__logit_adjust=True)
    assert_follows(method)
    trained = [set(record["trained"]) for record in read_metrics(method.config.run_dir)]
    assert set.union(*trained) == {"expert.0", "expert.1", "expert.2"}


def test_anchors_chosen_by_embeddings_drive_the_expert_of_their_position(tiny_run: TinyRunner) -> None:
    """Farthest first: the client whose mean embedding is farthest from the mean, then twice the one farthest from
    those chosen; in ascending order they are bound to experts 0, 1, 2."""
    method = tiny_run("fedjets", cohort__anchor_selection="farthest")
    means = np.stack([samples_of(method.config, client).h.mean(axis=0) for client in range(7)])
    anchors = [int(np.linalg.norm(means - means.mean(axis=0), axis=1).argmax())]
    while len(anchors) < EXPERTS:
        anchors.append(int(np.linalg.norm(means[:, None] - means[anchors], axis=2).min(axis=1).argmax()))
    assert method.anchors == tuple(sorted(anchors)) != (0, 1, 2)
    assert_follows(method, bound=sorted(anchors))
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    assert summary["anchors"] == sorted(anchors)


# Unseen clients -------------------------------------------------------------------------------------------------------


def corrected(p: Array, prior: str, labels: Array) -> Array:
    """Return p by a client's label shares: as they are, by EM or MAP-EM, those of 2 %, or the labels that it has."""
    q, before, pseudo = np.full(CLASSES, 1 / CLASSES), np.zeros(CLASSES), 1.0 if prior == "map" else 0.0
    for _ in range(500 if prior in ("em", "support", "map") else 0):
        if np.abs(q - before).max() < 1e-7:
            break
        before = q
        q = ((q * p / (q * p).sum(axis=1, keepdims=True)).sum(axis=0) + pseudo) / (len(p) + pseudo * CLASSES)
    shares = {"none": np.ones(CLASSES), "support": q >= 0.02, "masked": np.isin(np.arange(CLASSES), labels)}
    return p * shares.get(prior, q)


def readings_by_hand(method: Finished, state: Vectors, client: int) -> tuple[list[int], Array, dict[str, float]]:
    """Return an unseen client's experts, the share of its samples that each one answers, and the accuracy of each
    read-out with each correction."""
    samples, names = samples_of(method.config, client), [n for n in state if n.startswith("expert.")]
    ids = list(range(len(names)))
    if "gate" in state and method.strategy.routed:
        ids = chosen(state["gate"], samples.h, method.config.moe.top_k)
    p = np.stack([by_hand.softmax(by_hand.expert(state[f"expert.{m}"], samples.x)[0]) for m in ids])
    surest = (-(p * np.log(p)).sum(axis=2)).mean(axis=1).argmin()  # without a gate it answers alone
    g = np.eye(len(names))[[surest] * len(samples)]
    g = by_hand.scores(state["gate"], samples.h) if "gate" in state else g
    w = g[:, ids].T
    mixture = (w[:, :, None] * p).sum(axis=0) / w.sum(axis=0)[:, None]
    read = {
        "top-1": p[w.argmax(axis=0), np.arange(len(samples))],
        "mixture": mixture,
        "blend": np.sqrt(mixture * by_hand.softmax(samples.h)),
        "mean": p.mean(axis=0),
        "surest": p[surest],
    }
    read["blend"] /= read["blend"].sum(axis=1, keepdims=True)
    right = {}
    for reading in COUNTED:
        name, prior, *_ = reading.split("/")  # heads have no batch norm, and AdaBN changes nothing
        right[reading] = float((corrected(read[name], prior, samples.y).argmax(axis=1) == samples.y).mean())
    load = np.bincount(np.array(ids)[w.argmax(axis=0)], minlength=len(names)) / len(samples)
    return ids, load, right


@pytest.mark.parametrize("name", list(METHODS))
def test_unseen_clients_answer_as_by_hand_with_every_read_out(tiny_run: TinyRunner, name: str) -> None:
    """After every second round and the last; the accuracy of a run is that of the method's own read-out."""
    method = tiny_run(name)
    own = {"ensembles": "mean", "fedmix": "mixture"}.get(name, "top-1")
    records = read_metrics(method.config.run_dir)
    assert ["evaluation" in record for record in records] == [False, True, True]
    for record, (_, state) in list(zip(records, by_rounds(method), strict=True))[1:]:
        by_client = {client: readings_by_hand(method, state, client) for client in UNSEEN}
        found = record["evaluation"]
        means = {r: sum(right[r] for *_, right in by_client.values()) / 2 for r in COUNTED}
        assert found["readings"] == pytest.approx(means)
        assert found["chosen"] == {str(client): ids for client, (ids, _, _) in by_client.items()}
        assert found["reading"] == f"{own}/none"
        assert found["accuracy"] == pytest.approx(means[f"{own}/none"])
        assert found["per_client_accuracy"] == pytest.approx(
            {str(client): right[f"{own}/none"] for client, (_, _, right) in by_client.items()}
        )
        assert len(set(means.values())) > 2
        load = sum(load for _, load, _ in by_client.values()) / 2
        assert found["expert_load"] == pytest.approx(load.tolist())
        assert found["collapsed"] == (name in ("fedjets", "fedmix") and max(load) > 0.95)


def test_experts_are_measured_on_the_classes_of_unseen_clients(tiny_run: TinyRunner) -> None:
    """After the last round, and every so many if asked for; a class that no unseen client holds is unknown."""
    method = tiny_run("fedjets", run__inspect_every=2, run__evaluate_every=1)
    records = read_metrics(method.config.run_dir)
    assert ["inspection" in record for record in records] == [False, True, True]
    for record, (_, state) in list(zip(records, by_rounds(method), strict=True))[1:]:
        held = [samples_of(method.config, client) for client in UNSEEN]
        x, y = np.concatenate([s.x for s in held]), np.concatenate([s.y for s in held])
        for m, row in enumerate(record["inspection"]["expert_class_accuracy"]):
            hits = by_hand.expert(state[f"expert.{m}"], x)[0].argmax(axis=1) == y
            wanted = [float(hits[y == label].mean()) if label in y else None for label in range(CLASSES)]
            assert row == [None if value is None else pytest.approx(value, abs=1e-5) for value in wanted]


def test_an_oracle_also_serves_unseen_clients(tiny_run: TinyRunner) -> None:
    method = tiny_run("fedjets", gate__mode="oracle")
    record = read_metrics(method.config.run_dir)[-1]["evaluation"]
    wanted = {str(c): best(one_hot(method.config, c), method.config) for c in UNSEEN}
    assert record["chosen"] == wanted


# What a run leaves ----------------------------------------------------------------------------------------------------


def with_own_statistics(config: Config, client: int) -> Array:
    """Return the common expert's logits with batch-norm statistics of a client's samples, (n, C)."""
    model = copy.deepcopy(common_expert().model).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    pixels = common_expert().normalise(open_client(config, client).images.pixels)
    with torch.no_grad():
        model(pixels)
        logits: Array = model.eval()(pixels).double().numpy()
    return logits


def of_likeliest_groups(p: Array, groups: Sequence[Sequence[int]], held: int) -> Array:
    """Return p of the classes of the ``held`` groups with the most of it, and 0 elsewhere."""
    masses = [sum(p[:, label].sum() for label in group) for group in groups]
    likeliest = np.argsort(-np.array(masses))[:held]
    return p * np.isin(np.arange(CLASSES), [label for position in likeliest for label in groups[position]])


def controls_by_hand(
    config: Config, client: int, temperature: float, groups: Sequence[Sequence[int]], held: int
) -> dict[str, float]:
    """Return an unseen client's accuracy by every control."""
    samples, right = samples_of(config, client), {}
    for statistics, logits in (("", samples.h), ("_adabn", with_own_statistics(config, client))):
        p = by_hand.softmax(logits)
        answers = {("" if prior == "none" else f"_{prior}"): corrected(p, prior, samples.y) for prior in PRIORS}
        answers["_tempered"] = corrected(by_hand.softmax(logits / temperature), "em", samples.y)
        answers["_groups"] = of_likeliest_groups(p, groups, held)
        for name, q in answers.items():
            right[f"common_expert{statistics}{name}"] = float((q.argmax(axis=1) == samples.y).mean())
    return right


def mean_controls_by_hand(
    config: Config, temperature: float, groups: Sequence[Sequence[int]], held: int
) -> dict[str, float]:
    found = [controls_by_hand(config, client, temperature, groups, held) for client in UNSEEN]
    return {name: sum(right[name] for right in found) / len(found) for name in found[0]}


def test_the_controls_are_the_common_experts_own_answers(tiny_run: TinyRunner) -> None:
    """Trained and with a client's own statistics; there are no groups in a Dirichlet split, and no temperature."""
    method = tiny_run("fedavg")
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    known = {name: v for name, v in mean_controls_by_hand(method.config, 1.0, [], 0).items()
             if not name.endswith(("tempered", "groups"))}  # fmt: skip
    assert list(summary["controls"]) == list(known)
    assert summary["controls"] == pytest.approx(known)


def test_controls_know_the_temperature_and_how_many_groups_a_client_holds(tiny_run: TinyRunner) -> None:
    """Each of five anchors holds one group of two classes, every other client two; of no client are samples few."""
    path = tiny_run.folder / "tempered.safetensors"
    save_common_expert(replace(common_expert(), temperature=0.7), path)
    split: dict[str, Scalar] = {"partition__name": "label-groups", "partition__labels_per_client": 4}
    split |= {"partition__anchors": 5, "partition__samples_per_client": 60, "partition__unseen_samples": 200}
    split |= {"cohort__normals": 2}
    method = tiny_run("fedavg", common_expert__path=str(path), run__rounds=1, **split)
    groups = [sorted(set(samples_of(method.config, anchor).y.tolist())) for anchor in range(5)]
    assert sorted(label for group in groups for label in group) == list(range(CLASSES))
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    wanted = mean_controls_by_hand(method.config, 0.7, groups, 2)
    assert list(summary["controls"]) == list(CONTROLS) == list(wanted)
    assert summary["controls"] == pytest.approx(wanted)
    for temperature, held in ((1.0, 2), (0.7**2, 2), (1 / 0.7, 2), (0.7, 1), (0.7, 3)):  # each of them matters
        assert mean_controls_by_hand(method.config, temperature, groups, held) != pytest.approx(wanted)


@pytest.mark.parametrize(("name", "served", "gate"), [("fedavg", 1, 0), ("ensembles", 2, 0), ("fedjets", 2, 87)])
def test_facts_of_a_run(tiny_run: TinyRunner, name: str, served: int, gate: int) -> None:
    """A linear expert has 4 * 10 + 10 weights and takes 2 * 4 * 10 operations a sample."""
    method = tiny_run(name)
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    wanted = {
        "privacy": {}, "classes": [str(label) for label in range(10)], "image_shape": [1, 8, 8], "anchors": [0, 1, 2],
        "trained_parameters": served * 50 + gate, "flops_per_answer": served * 80,
        "common_expert_parameters": common_expert().num_parameters,
        "bytes_setup": 9 * len(common_expert().as_bytes),
    }  # fmt: skip
    assert {key: summary[key] for key in wanted} == wanted
    found = facts_of(method.strategy, method.rounds)
    assert {key: found[key] for key in wanted} == wanted
