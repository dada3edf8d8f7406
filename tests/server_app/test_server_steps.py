"""The server's half of every method by hand: who trains what, and what becomes of answers of unequal sizes."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import strategies
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import PooledMeans, Robust, RunningMeans
from fedjets_flwr.federation.cohort import Cohort, draw_cohort
from fedjets_flwr.federation.privacy import PrivateMeans
from fedjets_flwr.models.expert import build_configured_gate, build_expert, decode_architectures
from fedjets_flwr.models.flat_model import FlatModel, digest_of
from fedjets_flwr.models.flops import forward_flops
from fedjets_flwr.wire.messages import BadReply, Job, Number, Reply
from server_app.outcome import facts_of
from server_app.preparation import Prepared
from server_app.start import check_noise, request_facts
from tests.support.tiny import (
    CLASSES,
    EXPERTS,
    FEATURES,
    CannedReplies,
    TinyMethod,
    common_expert,
    samples_of,
    tiny,
    tiny_method,
)

EXPERT, GATE = FEATURES * CLASSES + CLASSES, 87
ALL = ("expert.0", "expert.1", "expert.2", "gate")
NOTHING: tuple[Any, Any, Any] = (None, None, None)
"""What hooks get that the state's own strategy has no use for."""
NAMES = ("ensembles", "fedavg", "fedjets", "fedmix", "fedprox", "ifca", "scaffold")
OWN = ("fedadg", "fedmoe", "fedsr", "finetune", "local", "randommoe", "specialist")
"""Methods that keep or make something at their clients, or learn text, whose steps are in ``tests/strategies``."""


def flat(value: float, size: int = EXPERT) -> Tensor:
    return torch.full((size,), value)


def reply(client: int, loss: float = 1.0, samples: int | None = None, /, **values: Any) -> Reply:
    """A client's reply: ``expert_1=3.0`` is the vector ``expert.1`` full of threes, a list or integer is a number."""
    given = {name.replace("_", "."): value for name, value in values.items()}
    vectors = {n: v if isinstance(v, Tensor) else flat(v) for n, v in given.items() if isinstance(v, float | Tensor)}
    numbers: dict[str, Number] = {n: v for n, v in given.items() if isinstance(v, int | list)}
    return Reply(
        client, vectors, {"num-examples": SAMPLES[client] if samples is None else samples, "loss": loss} | numbers
    )


SAMPLES = {client: len(samples_of(tiny(), client)) for client in range(9)}
"""20, 28, 9, 13, 15, 10, 10 of the training clients, 9 and 13 of the unseen ones."""


def assert_full(vector: Tensor, value: float) -> None:
    torch.testing.assert_close(vector, torch.full_like(vector, value))


# What a method is -----------------------------------------------------------------------------------------------------


def test_methods_are_the_modules_but_the_base() -> None:
    assert strategies.names() == sorted((*NAMES, *OWN))
    assert [strategies.strategy(name).__name__.lower() for name in NAMES] == list(NAMES)
    for wrong in ("base", "fedjet"):
        with pytest.raises(FedjetsError, match=rf"strategy.name = '{wrong}': no such method; .* ensembles, fedadg, .*"):
            strategies.strategy(wrong)


def test_settings_are_checked_by_the_method_that_they_name() -> None:
    strategies.validate(tiny(strategy__name="fedavg", aggregation__rule="median"))
    with pytest.raises(FedjetsError, match="SCAFFOLD needs 'mean'"):
        strategies.validate(tiny(strategy__name="scaffold", aggregation__rule="median"))


@pytest.mark.parametrize(
    ("name", "local", "reading", "drawn", "routed", "private", "experts", "served", "moved"),
    [
        ("fedavg", "fedavg", "top-1/none", "uniform", False, True, 1, 1, 1),
        ("fedprox", "fedprox", "top-1/none", "uniform", False, True, 1, 1, 1),
        ("scaffold", "scaffold", "top-1/none", "uniform", False, False, 1, 1, 1),
        ("ensembles", "fedavg", "mean/none", "uniform", False, False, 4, 4, 4),
        ("fedmix", "fedmix", "mixture/none", "uniform", False, True, 3, 3, 4),
        ("ifca", "ifca", "top-1/none", "uniform", False, True, 3, 3, 1),
        ("fedjets", "fedjets", "top-1/none", "anchored", True, True, 3, 2, 3),
    ],
)
def test_what_each_method_is(
    name: str, local: str, reading: str, drawn: str, routed: bool, private: bool, experts: int, served: int, moved: int
) -> None:
    method = tiny_method(name, ensembles__members=4)
    assert (method.strategy.algorithm, method.strategy.reading, method.strategy.drawn) == (local, reading, drawn)
    assert (method.strategy.routed, method.strategy.private) == (routed, private)
    assert (method.strategy.num_experts, method.strategy.experts_served, method.strategy.vectors_moved) == (
        experts,
        served,
        moved,
    )


def test_settings_take_the_place_of_a_methods_own_ways() -> None:
    method = tiny_method("fedjets", cohort__sampling="uniform", personalize__read_out="blend", personalize__prior="em")
    assert (method.strategy.drawn, method.strategy.reading) == ("uniform", "blend/em")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_a_state_begins_as_the_experts_that_clients_build(name: str, trainable: str) -> None:
    method = tiny_method(name, moe__trainable=trainable, model__width=2, moe__init="random")
    init = "random" if name in ("fedjets", "fedmix", "ifca") else "common"
    of = method.strategy
    experts = [build_expert(of.config, of.common, of.architecture(m), m, init) for m in range(of.num_experts)]
    wanted = {f"expert.{m}": FlatModel(expert).vector for m, expert in enumerate(experts)}
    spec = FlatModel(experts[0]).spec
    if init == "random":
        assert not torch.equal(wanted["expert.0"], wanted["expert.1"])
    if name in ("fedjets", "fedmix"):
        wanted["gate"] = FlatModel(build_configured_gate(of.config, of.common, EXPERTS)).vector
    if name == "scaffold":
        wanted["variate"] = torch.zeros(spec.trained)
    assert method.vectors.keys() == wanted.keys()
    assert all(torch.equal(method.vectors[n], wanted[n]) for n in wanted)
    assert all(of.spec_of(f"expert.{m}") == spec for m in range(of.num_experts))
    if "gate" in wanted:
        assert of.spec_of("gate").size == GATE
    if name == "scaffold":
        assert [of.spec_of(n).size for n in ("variate", "variate.3", "correction.3")] == [spec.trained] * 3
    facts = request_facts(of)
    assert decode_architectures(facts["experts"]) == [of.architecture(0)]
    assert facts["layout"] == digest_of([spec])
    sample = torch.zeros(1, FEATURES) if trainable == "head" else torch.zeros(1, 1, 8, 8)
    assert forward_flops(of.build(0), sample) > 0


def test_experts_may_all_start_from_the_common_expert() -> None:
    method = tiny_method("fedjets", moe__init="common")
    head = torch.cat([p.flatten() for p in common_expert().model[-1].parameters()])
    assert all(torch.equal(method.vectors[f"expert.{m}"], head) for m in range(EXPERTS))


NOISE: dict[str, Scalar] = {"privacy__noise_multiplier": 1.0}
UNROUTED = tuple(name for name in NAMES if name != "fedjets")
BATCH_NORM: dict[str, Scalar] = {"moe__trainable": "all", "model__norm": "batch"}


@pytest.mark.parametrize(
    ("name", "changes", "setting"),
    [
        ("scaffold", NOISE, "privacy.noise-multiplier = 1: not for"),
        ("ensembles", NOISE, "privacy.noise-multiplier = 1: not for"),
        ("fedjets", NOISE | {"cohort__anchor_selection": "k-means"}, "cohort.anchor-selection = 'k-means'"),
        ("fedjets", NOISE | {"aggregation__rule": "krum"}, "aggregation.rule = 'krum'"),
        ("scaffold", {"aggregation__rule": "krum"}, "aggregation.rule = 'krum'"),
        ("fedjets", NOISE | BATCH_NORM, "batch norm"),
        ("fedjets", NOISE | BATCH_NORM | {"common_expert__path": "file"}, "batch norm"),
        ("fedavg", NOISE | BATCH_NORM, "batch norm"),
        ("fedjets", {"partition__anchors": 4}, "partition.anchors = 4: more than moe.experts = 3"),
        ("fedjets", {"partition__anchors": 4, "cohort__sampling": "anchored"}, "partition.anchors = 4"),
        ("fedmix", {"gate__mode": "random"}, "gate.mode = 'random'"),
        ("fedmix", {"moe__mix": "logits"}, "moe.mix = 'logits'"),
        ("fedmix", {"gate__learns_from": "anchors"}, "gate.learns-from = 'anchors'"),
        ("fedjets", {"gate__learns_from": "anchors", "cohort__sampling": "uniform"}, "gate.learns-from = 'anchors'"),
        ("fedjets", {"gate__learns_from": "anchors", "cohort__anchors": 0}, "gate.learns-from = 'anchors'"),
        ("fedjets", {"gate__mode": "oracle", "cohort__anchor_selection": "k-means"}, "gate.mode = 'oracle'"),
        (
            "fedjets",
            {"gate__mode": "oracle", "partition__anchors": 4, "cohort__sampling": "uniform"},
            "gate.mode = 'oracle': 4 anchors are not one for each of 3 experts",
        ),
        *((name, {"privacy__route_epsilon": 1.0}, "privacy.route-epsilon = 1: .* tell no route") for name in UNROUTED),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(name: str, changes: dict[str, Scalar], setting: str) -> None:
    with pytest.raises(FedjetsError, match=setting):
        strategies.strategy(name).validate(tiny(**changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in NAMES),
        ("fedjets", {"gate__learns_from": "anchors", "cohort__anchors": 1}),
        ("fedjets", NOISE),
        ("fedavg", NOISE),
        ("fedavg", NOISE | BATCH_NORM | {"common_expert__path": "file"}),
        ("fedjets", NOISE | BATCH_NORM | {"common_expert__path": "file", "moe__init": "common"}),
        ("fedjets", BATCH_NORM),
        ("fedjets", {"cohort__anchor_selection": "k-means", "aggregation__rule": "krum"}),
        ("ensembles", {"aggregation__rule": "krum"}),
        ("fedjets", {"partition__anchors": 4, "cohort__sampling": "uniform"}),
        ("fedjets", {"partition__anchors": 2, "gate__mode": "random", "moe__mix": "logits"}),
        ("fedmix", {"partition__anchors": 4, "moe__mix": "probs"}),
    ],
)
def test_settings_that_make_sense_are_not(name: str, changes: dict[str, Scalar]) -> None:
    strategies.strategy(name).validate(tiny(**changes))


# Who trains what ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_everyone_trains_the_one_model(name: str) -> None:
    jobs = tiny_method(name).planned(1, [3], [1, 6])
    assert jobs == [Job(c, ("expert.0",), ("expert.0",), cost=SAMPLES[c]) for c in (1, 3, 6)]


@pytest.mark.parametrize("option", ["I", "II"])
def test_clients_of_scaffold_get_the_model_and_c_less_c_i(option: str) -> None:
    method = tiny_method("scaffold", scaffold__option=option)
    method.vectors |= {"variate": flat(0.5), "variate.1": flat(2.0), "variate.4": flat(9.0)}
    jobs = method.planned(2, [6], [1])
    for job, client in zip(jobs, (1, 6), strict=True):
        variate = (f"variate.{client}",) if option == "I" else ()
        assert job == Job(
            client, ("expert.0", f"correction.{client}"), ("expert.0", *variate), cost=SAMPLES[client]
        )  # fmt: skip
    sent = method.strategy.outgoing(jobs)
    assert set(sent) - set(method.vectors) == {"correction.1", "correction.6"}
    assert_full(sent["correction.1"], -1.5)
    assert_full(sent["correction.6"], 0.5)
    assert set(method.strategy.outgoing([Job(6, ("expert.0",))])) == set(method.vectors)  # who is scored needs none


def test_every_client_of_fedmix_trains_everything() -> None:
    method = tiny_method("fedmix")
    assert method.strategy.everything == ALL
    assert method.planned(1, [2], [5, 0]) == [Job(c, ALL, ALL, cost=3 * SAMPLES[c]) for c in (0, 2, 5)]


def test_a_client_of_ifca_receives_all_models_and_returns_one_and_an_anchor_has_its_own_alone() -> None:
    method = tiny_method("ifca", cohort__sampling="anchored")
    method.strategy.anchors = (3, 5, 6)
    assert method.planned(1, [5], [0, 2]) == [
        Job(0, ALL[:3], ("trained",), cost=SAMPLES[0] * 5 / 3),
        Job(2, ALL[:3], ("trained",), cost=SAMPLES[2] * 5 / 3),
        Job(5, ("expert.1",), ("trained",), cost=SAMPLES[5]),
    ]
    assert method.strategy.spec_of("trained") == method.strategy.spec_of("expert.2")


def test_the_models_of_ifca_are_the_averages_of_those_who_chose_them() -> None:
    method = tiny_method("ifca")
    before = method.vectors["expert.1"]
    found = method.merged(
        [reply(0, trained=1.0, cluster=2), reply(1, trained=5.0, cluster=0), reply(2, trained=3.0, cluster=2)]
    )
    mean = (SAMPLES[0] * 1.0 + SAMPLES[2] * 3.0) / (SAMPLES[0] + SAMPLES[2])
    torch.testing.assert_close(method.vectors["expert.2"], flat(mean))
    torch.testing.assert_close(method.vectors["expert.0"], flat(5.0))
    assert method.vectors["expert.1"] is before
    assert (found["expert.2"], found["expert.0"]) == (2, 1)


@pytest.mark.parametrize(
    ("cluster", "value", "reason"),
    [(3, 1.0, "cluster: expected an integer from 0 to 2"), (-1, 1.0, "cluster: expected an integer from 0"),
     (0, 1.0, "not the anchor's own"),
     (1, math.nan, "expert.1 is not finite"), (1, 1e9, "expert.1 is over limits.max-growth"), (1, 1.0, "")],
)  # fmt: skip
def test_a_reply_to_ifca_is_checked_as_the_model_that_it_says_it_is(cluster: int, value: float, reason: str) -> None:
    method = tiny_method("ifca", cohort__sampling="anchored")
    method.strategy.anchors = (3, 5, 6)
    found = method.refused(reply(5, trained=value, cluster=cluster), reply(0, trained=1.0, cluster=2))
    assert set(found) == ({5} if reason else set())
    assert reason in found.get(5, "")


def test_a_client_of_ifca_that_is_no_anchor_in_this_run_may_choose_any() -> None:
    method = tiny_method("ifca")
    assert method.refused(*(reply(c, trained=1.0, cluster=2) for c in range(3))) == {}


@pytest.mark.parametrize("name", ["fedavg", "fedjets", "ensembles"])
def test_who_opted_out_is_never_drawn_and_the_others_fill_the_cohort(name: str) -> None:
    method = tiny_method(name).strategy
    before = [method.cohort(r).clients for r in range(1, 9)]
    method.opted_out = frozenset({1, 4, 5})
    drawn = [method.cohort(r) for r in range(1, 9)]
    assert all({1, 4, 5}.isdisjoint(cohort.clients) for cohort in drawn)
    assert any({1, 4, 5}.intersection(clients) for clients in before)
    if name == "fedjets":  # anchors 0 to 2, others 3 to 6
        assert {(cohort.anchors, cohort.normals) for cohort in drawn} == {((0, 2), (3, 6))}
    else:
        assert {tuple(cohort.clients) for cohort in drawn} == {(0, 2, 3, 6)}
    method.opted_out = frozenset(range(7))
    assert method.cohort(1).clients == []


def test_members_of_an_ensemble_draw_cohorts_of_their_own() -> None:
    """A client trains the members that drew it, each by itself; one that could not be prepared trains none."""
    method = tiny_method("ensembles", ensembles__members=3)
    cohorts = [draw_cohort(method.strategy.config, 2, "uniform", (), member).normals for member in range(3)]
    assert len({tuple(cohort) for cohort in cohorts}) == 3
    everyone = sorted({client for cohort in cohorts for client in cohort})
    assert method.strategy.cohort(2) == Cohort((), tuple(everyone), 2)
    names = {c: tuple(f"expert.{m}" for m in range(3) if c in cohorts[m]) for c in everyone[1:]}
    assert len(set(names.values())) > 1
    jobs = method.planned(2, [], everyone[1:])
    assert jobs == [Job(c, names[c], names[c], cost=SAMPLES[c] * len(names[c])) for c in everyone[1:]]


def test_members_of_an_ensemble_can_draw_anchors_and_normal_clients() -> None:
    method = tiny_method("ensembles", cohort__sampling="anchored")
    both = [draw_cohort(method.strategy.config, 1, "anchored", (0, 1, 2), member) for member in range(2)]
    assert method.strategy.cohort(1).clients == sorted({c for cohort in both for c in cohort.clients})


@pytest.mark.parametrize("mode", ["learned", "random"])
def test_an_anchor_trains_its_expert_and_a_normal_client_those_of_the_gate(mode: str) -> None:
    """The m-th anchor is bound to expert m, whatever its id; who is drawn as normal chooses, anchor or not."""
    method = tiny_method("fedjets", [reply(0, experts=[2, 0]), reply(6, experts=[0, 1])], gate__mode=mode)
    method.strategy.anchors = (3, 5, 6)
    jobs = method.planned(1, [3, 5], [0, 6])
    gate = ("gate",) if mode == "learned" else ()
    assert jobs == [
        Job(3, ("expert.0", "gate"), ("expert.0", *gate), {"anchor": 3}, SAMPLES[3]),
        Job(5, ("expert.1", "gate"), ("expert.1", *gate), {"anchor": 5}, SAMPLES[5]),
        Job(0, ("expert.2", "expert.0", "gate"), ("expert.2", "expert.0", *gate), {}, 2 * SAMPLES[0]),
        Job(6, ("expert.0", "expert.1", "gate"), ("expert.0", "expert.1", *gate), {}, 2 * SAMPLES[6]),
    ]
    asked = [Job(client, ("gate",), cost=SAMPLES[client]) for client in (0, 6)]
    assert method.exchange.asked == [("query.route", 1, asked)]
    assert method.exchange.sent.keys() == method.vectors.keys()
    assert method.rounds.watch.seconds["select"] > 0


def test_without_normal_clients_nobody_is_asked() -> None:
    method = tiny_method("fedjets")
    assert [job.client for job in method.planned(1, [1], [])] == [1]
    assert method.exchange.asked == []


@pytest.mark.parametrize("experts", [[1, 1], [0, 3], [-1, 0], [0], [0, 1, 2], None, [0.0, 1.0]])
def test_a_choice_that_is_none_is_refused_and_the_others_count(experts: Any) -> None:
    bad = reply(0, experts=experts) if experts is not None else reply(0)
    method = tiny_method("fedjets", [bad, reply(3, experts=[0, 2])])
    assert method.rounds.clients.route(1, [0, 3]) == {3: (0, 2)}
    assert set(method.rounds.clients.failures) == {0}
    assert "experts" in method.rounds.clients.failures[0]
    assert [job.client for job in method.planned(1, [], [0, 3])] == [3]


class Unwalked(dict[int, int]):
    """Tells of each client by its id, and refuses to go through all of them."""

    def keys(self) -> NoReturn:  # type: ignore[override]
        raise AssertionError("a round went through all clients")

    __iter__ = items = values = keys  # type: ignore[assignment]


def test_a_round_goes_through_no_clients_but_its_own() -> None:
    """Of 100,000 clients that took longer than averaging."""
    method = tiny_method("fedjets")
    method.strategy.num_samples = Unwalked(method.strategy.num_samples)
    method.exchange.given = [reply(client, experts=[0, 1]) for client in method.strategy.cohort(1).normals]
    assert method.rounds.configure_train(1, *NOTHING) is not None
    assert [kind for kind, _, _ in method.exchange.asked] == ["query.route", "train.fedjets"]


# What unseen clients receive ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("fedavg", ("expert.0",)),
        ("fedprox", ("expert.0",)),
        ("scaffold", ("expert.0",)),
        ("ensembles", ("expert.0", "expert.1")),
        ("fedmix", ALL),
        ("ifca", ALL[:3]),
    ],
)
def test_unseen_clients_receive_all_that_there_is(name: str, names: tuple[str, ...]) -> None:
    assert tiny_method(name).strategy.serve([7, 8], {}) == {7: names, 8: names}


def test_unseen_clients_receive_what_the_gate_chose_and_the_next_cohort_is_asked_along() -> None:
    """Then the next round asks only those of whom it does not know; what it learned serves that round alone."""
    method = tiny_method("fedjets")
    method.rounds.clients.unseen = [7, 8]
    cohort = method.strategy.cohort(2)
    absent, silent, *told = cohort.normals
    del method.strategy.num_samples[absent]
    given = {7: [2, 1], 8: [1, 0]} | {c: [0, 2] for c in told}
    method.exchange.given = [reply(c, experts=ids) for c, ids in given.items()]
    method.rounds.configure_evaluate(1, *NOTHING)
    (kind, server_round, jobs), (_, _, served) = method.exchange.asked
    assert (kind, server_round, [job.client for job in jobs]) == ("query.route", 1, [7, 8, silent, *told])
    assert {job.client: job.vectors for job in served} == {
        7: ("expert.2", "expert.1", "gate"), 8: ("expert.1", "expert.0", "gate")
    }  # fmt: skip
    method.exchange.asked.clear()
    method.exchange.given = [reply(silent, experts=[1, 2])]
    method.rounds.configure_train(2, *NOTHING)
    (_, _, prepared), (_, _, asked), (_, _, trained) = method.exchange.asked
    assert [job.client for job in prepared] == [absent]
    assert [job.client for job in asked] == [silent]
    names = {job.client: job.vectors for job in trained if "anchor" not in job.numbers}
    assert names == {silent: ("expert.1", "expert.2", "gate")} | dict.fromkeys(told, ("expert.0", "expert.2", "gate"))
    method.exchange.asked.clear()
    method.rounds.configure_train(2, *NOTHING)
    assert [job.client for job in method.exchange.asked[1][2]] == [silent, *told]


def test_after_the_last_round_only_unseen_clients_are_asked() -> None:
    method = tiny_method("fedjets", [reply(8, experts=[0, 1])])
    method.rounds.clients.unseen = [7, 8]
    method.rounds.configure_evaluate(4, *NOTHING)
    (_, _, routed), (_, _, served) = method.exchange.asked
    assert [job.client for job in routed] == [7, 8]
    assert [(job.client, job.vectors) for job in served] == [(8, ("expert.0", "expert.1", "gate"))]
    method.exchange.asked.clear()
    method.rounds.configure_evaluate(3, *NOTHING)
    assert len(method.exchange.asked[0][2]) > 2


@pytest.mark.parametrize("sampling", ["anchored", "uniform"])
@pytest.mark.parametrize("server_round", [1, 2])
def test_those_asked_along_are_the_normal_clients_of_the_next_round(sampling: str, server_round: int) -> None:
    method = tiny_method("fedjets", cohort__normals=1, cohort__sampling=sampling)
    method.rounds.clients.unseen = [7]
    method.rounds.configure_evaluate(server_round, *NOTHING)
    coming = draw_cohort(method.strategy.config, server_round + 1, sampling, method.strategy.anchors).normals
    assert [job.client for job in method.exchange.asked[0][2]] == [7, *coming]


# The messages of a round ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_train_messages_carry_the_jobs_of_the_cohort(name: str) -> None:
    """And SCAFFOLD's corrections besides the state. Nodes are looked for before."""
    method = tiny_method(name, limits__exchange_seconds=45.0)
    assert method.rounds.configure_train(2, *NOTHING) == ("the messages",)
    cohort = method.strategy.cohort(2)
    assert method.rounds.cohort == cohort
    jobs = method.strategy.plan(cohort, {})
    assert method.exchange.asked == [(f"train.{name}", 2, jobs)]
    corrections = {f"correction.{c}" for c in cohort.clients} if name == "scaffold" else set()
    assert method.exchange.sent.keys() == method.vectors.keys() | corrections
    assert method.exchange.refreshed == [(cohort.clients, 45.0)]
    assert method.exchange.served == [False]


def test_who_could_not_be_prepared_is_left_out_of_the_messages_and_counts_as_failed() -> None:
    """Anchor or normal; it is asked to prepare first, here in vain."""
    method = tiny_method("fedjets", limits__exchange_seconds=45.0)
    cohort = method.strategy.cohort(2)
    anchors, normals = cohort.anchors, cohort.normals
    lost = [anchors[0], normals[1]]
    for client in lost:
        del method.strategy.num_samples[client]
    method.rounds.clients.failures = {99: "from before"}
    method.rounds.configure_train(2, *NOTHING)
    assert [(kind, [job.client for job in jobs]) for kind, _, jobs in method.exchange.asked] == [
        ("query.prepare", sorted(lost)), ("query.route", [normals[0], normals[2]]), ("train.fedjets", [anchors[1]]),
    ]  # fmt: skip
    assert method.rounds.clients.failures == {99: "from before"} | dict.fromkeys(lost, "could not be prepared")
    assert method.rounds.cohort == cohort


def test_evaluate_messages_go_to_the_unseen_clients_that_were_served() -> None:
    """Clients without labels are served, but have nothing to count."""
    chosen = [reply(7, experts=[0, 2]), reply(5, experts=[1, 2])]
    method = tiny_method("fedjets", chosen, run__rounds=1)
    method.rounds.clients.unseen, method.rounds.clients.unlabelled = [7, 8], [5]
    assert method.rounds.configure_evaluate(1, *NOTHING) == ("the messages",)
    assert [job.client for job in method.exchange.asked[0][2]] == [7, 8, 5]
    job = Job(7, ("expert.0", "expert.2", "gate"), cost=SAMPLES[7])
    assert method.exchange.asked[1] == ("evaluate", 1, [job])
    assert method.exchange.size_of("gate") == GATE
    assert method.exchange.served == [False, False]
    assert method.exchange.sent.keys() == method.vectors.keys()


def test_answers_to_train_messages_are_folded_in_and_counted() -> None:
    method = tiny_method("fedavg")
    method.rounds.clients.failures = {5: "from before"}
    method.rounds._pending = CannedReplies(())  # type: ignore[assignment]
    arrays, metrics = method.rounds.aggregate_train(
        1, [reply(0, 2.0, expert_0=1.0), reply(2, float("nan"), expert_0=9.0)]
    )
    assert arrays is None
    assert dict(metrics) == {"loss": 2.0, "expert.0": 1}
    assert set(method.rounds.clients.failures) == {2, 5}
    assert_full(method.vectors["expert.0"], 1.0)


# Averages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "ensembles", "fedjets"])
def test_models_are_averaged_by_sample_counts(name: str) -> None:
    """20, 9 and 13 samples: (20 * 1 + 9 * 2 + 13 * 4) / 42 = 90 / 42; the loss likewise."""
    method = tiny_method(name, train__batch_size=50)
    replies = ((0, 3.0, 1.0), (2, 5.0, 2.0), (3, 0.5, 4.0))
    found = method.merged([reply(c, loss, expert_0=value, steps=2) for c, loss, value in replies])
    assert_full(method.vectors["expert.0"], 90 / 42)
    assert found == {"loss": pytest.approx((60 + 45 + 6.5) / 42), "expert.0": 3}
    assert method.updated == {"expert.0"}


def test_models_can_count_the_same_whatever_their_samples() -> None:
    method = tiny_method("fedavg", aggregation__weighting="equal")
    found = method.merged([reply(0, 3.0, expert_0=1.0), reply(2, 5.0, expert_0=2.0)])
    assert_full(method.vectors["expert.0"], 1.5)
    assert found["loss"] == pytest.approx((20 * 3 + 9 * 5) / 29)
    assert method.strategy.weight_of("expert.0", reply(0)) == 1.0


def test_every_vector_is_averaged_over_those_who_trained_it() -> None:
    """Expert 0: clients 0 and 2; expert 1: 2 and 3; the gate: all; expert 2: nobody, it keeps its bits."""
    method = tiny_method("fedjets")
    before = method.vectors["expert.2"]
    bits = before.clone()
    gates = {c: flat(float(c), GATE) for c in (0, 2, 3)}
    found = method.merged(
        [
            reply(0, expert_0=1.0, gate=gates[0]),
            reply(2, expert_0=4.0, expert_1=1.0, gate=gates[2]),
            reply(3, expert_1=2.0, gate=gates[3]),
        ],
    )
    assert_full(method.vectors["expert.0"], (20 * 1 + 9 * 4) / 29)
    assert_full(method.vectors["expert.1"], (9 * 1 + 13 * 2) / 22)
    assert_full(method.vectors["gate"], (9 * 2 + 13 * 3) / 42)
    assert method.vectors["expert.2"] is before
    assert torch.equal(before, bits)
    assert found == {"loss": 1.0, "expert.0": 2, "expert.1": 2, "gate": 3}
    assert method.updated == {"expert.0", "expert.1", "gate"}


@pytest.mark.parametrize("bn", ["mean", "pooled"])
def test_a_mean_is_made_in_the_memory_of_the_round_before_last(bn: str) -> None:
    method = tiny_method("fedavg", aggregation__bn=bn)
    addresses = []
    for value in (1.0, 2.0, 3.0):
        addresses.append(method.vectors["expert.0"].data_ptr())
        old = method.vectors["expert.0"]
        kept = old.clone()
        method.merged([reply(0, expert_0=value)])
        assert torch.equal(old, kept)
        assert_full(method.vectors["expert.0"], value)
    assert method.vectors["expert.0"].data_ptr() == addresses[1] != addresses[2] == addresses[0]


@pytest.mark.parametrize(("weighting", "share"), [("responsibility", (15.0, 3.0)), ("samples", (20.0, 9.0))])
def test_an_expert_of_fedmix_is_averaged_by_the_mass_that_clients_gave_it(
    weighting: str, share: tuple[float, float]
) -> None:
    """p(z|s) N_s of the same expert; of a mass below a millionth of the samples nothing counts, 3e-6 of 3 million."""
    method = tiny_method("fedmix", fedmix__weighting=weighting)
    first = reply(0, expert_0=1.0, expert_1=1.0, gate=flat(1.0, GATE), mass=[5.0, 15.0, 0.0])
    second = reply(2, expert_0=2.0, expert_1=4.0, gate=flat(3.0, GATE), mass=[6.0, 3.0, 0.0])
    method.merged([first, second])
    a, b = share
    assert_full(method.vectors["expert.1"], (a * 1 + b * 4) / (a + b))
    assert_full(method.vectors["gate"], (20 * 1 + 9 * 3) / 29)
    assert [method.strategy.weight_of(f"expert.{m}", first) for m in range(3)] == (
        [5, 15, 0] if weighting == "responsibility" else [20, 20, 20]
    )


def test_next_to_no_mass_counts_for_nothing() -> None:
    method = tiny_method("fedmix")
    numbers: dict[str, Number] = {"mass": [3.0, 3.5, 9e6]}
    method.strategy.num_samples[0] = 3_000_000
    method.strategy.weights[0] = 3_000_000.0
    weights = [method.strategy.weight_of(f"expert.{m}", Reply(0, {}, numbers)) for m in range(3)]
    assert weights == [0, 3.5, 9e6]


def test_a_bounded_weight_bounds_the_mass() -> None:
    """A client that counts for a quarter of its samples has a quarter of its stake."""
    method = tiny_method("fedmix")
    method.strategy.weights[0] = 5.0
    numbers: dict[str, Number] = {"mass": [8.0, 12.0, 0.0]}
    assert [method.strategy.weight_of(f"expert.{m}", Reply(0, {}, numbers)) for m in range(3)] == [2.0, 3.0, 0.0]


def test_answers_below_the_least_leave_all_as_it_was() -> None:
    method = tiny_method("fedavg", limits__min_replies=2)
    before = method.vectors["expert.0"]
    found = method.merged([reply(0, 3.0, expert_0=1.0)])
    assert method.vectors["expert.0"] is before
    assert found == {"loss": 3.0, "expert.0": 1}
    assert method.updated == set()
    method.merged([reply(0, expert_0=1.0), reply(2, expert_0=1.0)])
    assert_full(method.vectors["expert.0"], 1.0)
    assert method.updated == {"expert.0"}
    method.merged([reply(0, expert_0=2.0)])
    assert method.updated == set()


def test_a_vector_with_fewer_answers_than_the_least_stays_alone() -> None:
    method = tiny_method("fedjets", limits__min_replies_per_expert=2)
    before = method.vectors["expert.1"]
    method.merged([reply(0, expert_0=1.0), reply(2, expert_0=1.0, expert_1=1.0)])
    assert_full(method.vectors["expert.0"], 1.0)
    assert method.vectors["expert.1"] is before
    assert method.updated == {"expert.0"}


def test_a_mean_that_is_not_finite_leaves_its_vector_as_it_was() -> None:
    """Two finite models whose sum overflows; the other vectors of the round count."""
    method = tiny_method("fedjets")
    before = method.vectors["expert.0"]
    huge = {"expert_0": 3e38, "expert_1": 1.0}
    method.merged([reply(5, **huge), reply(6, **huge)])
    assert method.vectors["expert.0"] is before
    assert method.updated == {"expert.1"}
    assert method.rounds._left == {"expert.0": "its mean is not finite"}


def test_a_mean_beyond_all_growth_leaves_its_vector_as_it_was_and_is_named() -> None:
    method = tiny_method("fedjets")
    before = method.vectors["expert.0"]
    method.merged([reply(5, expert_0=1e6, expert_1=1.0)])
    assert method.vectors["expert.0"] is before
    assert method.updated == {"expert.1"}
    assert method.rounds._left == {"expert.0": "its mean is over 1000 times as long as it was"}


def test_an_absurd_loss_counts_as_ten_times_the_median() -> None:
    method = tiny_method("fedavg")
    found = method.merged([reply(0, 1.0, expert_0=1.0), reply(1, 2.0, expert_0=1.0), reply(2, 1e30, expert_0=1.0)])
    weights = [method.strategy.weights[client] for client in (0, 1, 2)]
    assert found["loss"] == pytest.approx((weights[0] * 1 + weights[1] * 2 + weights[2] * 20) / sum(weights))


def test_one_clients_samples_count_as_ten_times_the_median_at_most() -> None:
    method = tiny_method("fedavg")
    held = dict.fromkeys(range(7), 10) | {3: 10_000_000}
    method.rounds.clients.take(Prepared(num_samples=held))
    assert method.strategy.weights == {client: 100.0 if client == 3 else 10.0 for client in range(7)}
    found = method.strategy.weight_of("expert.0", Reply(3, {}, {"num-examples": 10_000_000}))
    assert found == 100.0


def test_a_round_without_answers_has_no_loss_and_changes_nothing() -> None:
    method = tiny_method("fedavg")
    before = dict(method.vectors)
    found = method.merged([])
    assert found["loss"] != found["loss"]
    assert list(found) == ["loss"]
    assert all(method.vectors[name] is before[name] for name in before)


@pytest.mark.parametrize("fails", [False, True])
def test_a_round_that_lost_too_many_clients_ends_the_run(fails: bool) -> None:
    """Of two anchors and two normal clients half may fail; those of other cohorts do not count."""
    method = tiny_method("fedjets")
    method.rounds.cohort = Cohort((0, 1), (3, 4), 7)
    method.rounds.clients.failures = {0: "gone", 6: "gone"} | ({4: "gone"} if fails else {})
    method.rounds.clients.failures[3] = "lost"
    before = dict(method.vectors)
    if fails:
        with pytest.raises(FedjetsError, match="round 7: 3 of 4 clients failed"):
            method.rounds.merge(7, iter([reply(1, expert_1=1.0)]))
        assert method.vectors == before
    else:
        method.rounds.merge(7, iter([reply(1, expert_1=1.0)]))
        assert [name for name in before if method.vectors[name] is not before[name]] == ["expert.1"]


def test_the_seconds_of_averaging_are_counted() -> None:
    method = tiny_method("fedavg")
    method.merged([reply(0, expert_0=1.0)])
    once = method.rounds.watch.seconds["aggregate"]
    method.merged([reply(0, expert_0=1.0)])
    assert 0 < once < method.rounds.watch.seconds["aggregate"] < 1
    assert set(method.rounds.watch.seconds) == {"aggregate"}


def test_a_rule_of_the_settings_takes_the_place_of_the_mean() -> None:
    method = tiny_method("fedavg", aggregation__rule="median")
    assert isinstance(method.rounds.aggregator(), Robust)
    method.merged([reply(0, expert_0=1.0), reply(2, expert_0=2.0), reply(3, expert_0=90.0)])
    assert_full(method.vectors["expert.0"], 2.0)
    assert isinstance(tiny_method("fedavg").rounds.aggregator(), RunningMeans)


# Batch norm's variances, and privacy ----------------------------------------------------------------------------------


def test_variances_of_batch_norm_can_be_those_of_all_samples_together() -> None:
    """Weights 20 and 9, means 1 and 4, variances 2 and 3: E[var] + E[m^2] - E[m]^2, every other entry is averaged."""
    method = tiny_method("fedavg", moe__trainable="all", aggregation__bn="pooled")
    assert isinstance(method.rounds.aggregator(), PooledMeans)
    kinds = [
        name.rpartition(".")[2]
        for name, shape in method.strategy.specs["expert.0"].entries
        for _ in range(math.prod(shape))
    ]
    at = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in ("running_mean", "running_var")}
    assert len(at["running_mean"]) == len(at["running_var"]) == 6
    first, second = flat(5.0, len(kinds)), flat(8.0, len(kinds))
    first[at["running_mean"]], first[at["running_var"]] = 1.0, 2.0
    second[at["running_mean"]], second[at["running_var"]] = 4.0, 3.0
    method.merged([reply(0, expert_0=first), reply(2, expert_0=second)])
    wanted = flat((20 * 5 + 9 * 8) / 29, len(kinds))
    mean = (20 * 1 + 9 * 4) / 29
    wanted[at["running_mean"]] = mean
    wanted[at["running_var"]] = (20 * (2 + 1**2) + 9 * (3 + 4**2)) / 29 - mean**2
    torch.testing.assert_close(method.vectors["expert.0"], wanted)


def private(name: str, folder: Path, **changes: Scalar) -> Any:
    """A method whose noise is none to speak of, and that writes its ledger to a folder."""
    return tiny_method(name, run__output_dir=str(folder.parent), run__name=folder.name, **QUIET | changes)


def privacy_of(method: TinyMethod) -> Any:
    """Return what ``summary.json`` says of what the run spent."""
    return facts_of(method.strategy, method.rounds)["privacy"]


QUIET: dict[str, Scalar] = {"privacy__noise_multiplier": 1e-9, "privacy__clip_norm": 2.0}


def released(folder: Path) -> list[dict[str, Any]]:
    path = folder / "releases.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_private_updates_are_clipped_and_averaged_and_each_release_is_counted(tmp_path: Path) -> None:
    """Updates of norm 4 and 1 count the same, the first cut to 2: (2 / 4 * 4 + 1) / 2 = 1.5 of the unit vector."""
    method = private("fedjets", tmp_path)
    assert isinstance(method.rounds.aggregator(), PrivateMeans)
    start, unit = method.vectors["expert.0"], flat(EXPERT**-0.5)
    method.merged([reply(0, expert_0=start + 4 * unit), reply(2, expert_0=start + unit)], server_round=3)
    torch.testing.assert_close(method.vectors["expert.0"], start + 1.5 * unit)
    line = {"kind": "sums", "round": 3, "noise_multiplier": 1e-9, "normal": [4, 3], "anchor": [3, 2]}
    assert released(tmp_path) == [line]
    method.merged([])
    assert released(tmp_path) == [line]


def test_a_release_of_a_uniform_cohort_is_one_of_all_clients(tmp_path: Path) -> None:
    method = private("fedavg", tmp_path)
    method.merged([reply(0, expert_0=1.0)])
    (line,) = released(tmp_path)
    assert line["normal"] == line["anchor"] == [7, 5]


def test_the_noise_of_a_round_is_that_of_all_the_vectors_that_a_client_moves(tmp_path: Path) -> None:
    """z C sqrt(3) for two experts and the gate, over the two clients that moved the vector."""
    method = private("fedjets", tmp_path, privacy__noise_multiplier=0.5, model__width=32, moe__trainable="all",
                     model__norm="group")  # fmt: skip
    start = method.vectors["expert.0"]
    method.merged([reply(0, expert_0=start), reply(2, expert_0=start)])
    deviation = float((method.vectors["expert.0"] - start).std())
    assert deviation == pytest.approx(0.5 * 2.0 * 3**0.5 / 2, rel=4 / (2 * len(start)) ** 0.5)


def test_what_is_not_averaged_is_not_released(tmp_path: Path) -> None:
    method = private("fedavg", tmp_path, limits__min_replies=2)
    before = method.vectors["expert.0"]
    method.merged([reply(0, expert_0=1.0)])
    assert method.vectors["expert.0"] is before
    assert released(tmp_path) == []


def test_without_noise_nothing_is_counted(tmp_path: Path) -> None:
    method = private("fedjets", tmp_path, privacy__noise_multiplier=0.0)
    method.merged([reply(0, expert_0=1.0)])
    method.rounds.clients.route(1, [0])
    assert released(tmp_path) == []
    assert privacy_of(method) == {}


def test_every_question_for_randomised_ids_is_counted(tmp_path: Path) -> None:
    method = private("fedjets", tmp_path, privacy__noise_multiplier=0.0, privacy__route_epsilon=0.5)
    method.rounds.clients.route(2, [6, 0])
    assert released(tmp_path) == [{"kind": "routes", "round": 2, "epsilon": 0.5, "clients": [0, 6]}]
    method.rounds.clients.route(3, [6])
    assert privacy_of(method)["route_epsilon"] == 1.0


def test_a_run_tells_what_its_ledger_holds(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    method = private("fedavg", tmp_path, privacy__noise_multiplier=8.0)
    method.merged([reply(0, expert_0=1.0)])
    told = privacy_of(method)
    assert (told["releases"], told["delta"], told["route_epsilon"]) == (1, 1e-3, 0.0)
    assert 0 < told["epsilon_normal_secret_cohorts"] < told["epsilon_normal"] == told["epsilon_anchor"] < 2


def test_noise_on_running_statistics_is_refused_once_the_experts_are_known(tmp_path: Path) -> None:
    with pytest.raises(FedjetsError, match="batch norm"):
        check_noise(private("fedjets", tmp_path, moe__trainable="all").strategy, print)
    check_noise(private("fedjets", tmp_path, moe__trainable="all", model__norm="group").strategy, print)


# Which answers count --------------------------------------------------------------------------------------------------


def test_answers_are_checked_one_by_one() -> None:
    method = tiny_method("fedavg", limits__max_update_norm=1.0)
    start = method.vectors["expert.0"]
    found = method.refused(
        reply(0, expert_0=start + 1.1 / EXPERT**0.5),
        reply(1, expert_0=start + 0.9 / EXPERT**0.5),
        reply(2, float("nan"), expert_0=start),
        reply(3, 1.0, 12, expert_0=start),
        reply(4, expert_0=start * float("inf")),
    )
    assert set(found) == {0, 2, 3, 4}
    for client, reason in ((0, "max-update-norm"), (2, "loss"), (3, "13"), (4, "finite")):
        assert reason in found[client]
    assert method.rounds.clients.changed == {3}  # it holds other samples by now


@pytest.mark.parametrize(
    ("mass", "good"),
    [
        ([5.0, 15.0, 0.0], True),
        ([20.0, 0.0, 0.0], True),
        ([5.0, 15.019, 0.0], True),
        ([5.0, 15.021, 0.0], False),
        ([5.0, 14.979, 0.0], False),
        ([21.0, -1.0, 0.0], False),
        ([5.0, 15.0], False),
        ([5.0, 5.0, 5.0, 5.0], False),
        ([20.001, 0.0, 0.0], False),
        (20, False),
    ],
)  # fmt: skip
def test_a_mass_shares_the_samples_out(mass: Any, good: bool) -> None:
    method = tiny_method("fedmix")
    found = method.refused(reply(0, expert_0=1.0, mass=mass), reply(1, expert_0=1.0, mass=[28.0, 0.0, 0.0]))
    assert set(found) == (set() if good else {0})
    assert good or "mass" in found[0]


def test_a_mass_may_be_a_thousandth_off() -> None:
    method = tiny_method("fedmix")
    method.strategy.num_samples[0] = 1000
    assert method.refused(reply(0, 1.0, 1000, mass=[1000.0, 1.0, 0.0])) == {}


def test_fedmix_also_checks_what_every_method_checks() -> None:
    method = tiny_method("fedmix")
    assert "loss" in method.refused(reply(0, float("nan"), mass=[20.0, 0.0, 0.0]))[0]
    assert "mass" in method.refused(reply(0))[0]


def test_steps_of_scaffold_are_those_that_the_samples_make() -> None:
    """28 samples in batches of 5, twice: 12 steps."""
    method = tiny_method("scaffold")
    wrong = [method.refused(reply(1, expert_0=1.0, steps=steps)) for steps in (11, 13, 6)]
    assert all("steps" in found[1] for found in wrong)
    assert method.refused(reply(1, expert_0=1.0, steps=12)) == {}
    assert "loss" in method.refused(reply(1, float("nan"), steps=12))[1]
    often = tiny_method("scaffold", train__local_epochs=50)
    assert often.refused(reply(1, expert_0=1.0, steps=300)) == {}


def test_a_variate_is_bound_as_an_update_is() -> None:
    method = tiny_method("scaffold", limits__max_update_norm=1.0)
    start, unit = method.vectors["expert.0"], EXPERT**-0.5
    given = {"expert_0": start, "steps": 12}
    assert method.refused(reply(1, **given, variate_1=torch.eye(EXPERT)[3])) == {}
    assert "variate" in method.refused(reply(1, **given, variate_1=1.1 * unit))[1]
    assert method.refused(reply(1, **given)) == {}
    free = tiny_method("scaffold")
    assert free.refused(reply(1, expert_0=start, steps=12, variate_1=9.0)) == {}


# SCAFFOLD's variates --------------------------------------------------------------------------------------------------


def two_clients(method: TinyMethod, option: str) -> None:
    """Client 1 (28 samples, 12 steps) had c_1 = 2, client 6 (10 samples, 4 steps) none; c = 0.5."""
    method.vectors |= {"expert.0": flat(1.0), "variate": flat(0.5), "variate.1": flat(2.0), "variate.4": flat(9.0)}
    method.planned(3, [], [1, 6])
    new = {1: {"variate_1": 3.0}, 6: {"variate_6": -4.0}} if option == "I" else {1: {}, 6: {}}
    answers = [reply(1, expert_0=0.4, steps=12, **new[1]), reply(6, expert_0=1.6, steps=4, **new[6])]
    method.merged(answers, server_round=3)


def test_variates_of_option_one_are_those_that_clients_send() -> None:
    """Models count the same, as variates do (Algorithm 1).

    c grows by the sum of the changes over N = 7 clients: 0.5 + ((3 - 2) + (-4 - 0)) / 7.
    """
    method = tiny_method("scaffold", scaffold__option="I")
    two_clients(method, "I")
    assert_full(method.vectors["expert.0"], (0.4 + 1.6) / 2)
    wanted = {"variate.1": 3.0, "variate.6": -4.0, "variate.4": 9.0, "variate": 0.5 - 3 / 7}
    assert set(method.vectors) == {"expert.0", *wanted}
    for name, value in wanted.items():
        assert_full(method.vectors[name], value)


def test_who_opted_out_does_not_count_among_the_clients_of_a_variate() -> None:
    method = tiny_method("scaffold", scaffold__option="I")
    method.strategy.opted_out = frozenset({0, 2})
    two_clients(method, "I")
    assert_full(method.vectors["variate"], 0.5 - 3 / 5)


def test_who_is_no_training_client_cannot_opt_out() -> None:
    """A site may claim any ids; SCAFFOLD divides by the number of clients that are left."""
    method = tiny_method("scaffold", scaffold__option="I")
    assert method.rounds.clients.opt_out({0, 2, 7, 8, *range(100, 105)})
    assert method.strategy.opted_out == {0, 2}
    assert not method.rounds.clients.opt_out({2, 100})


def test_finite_variates_that_overflow_together_change_nothing() -> None:
    method = tiny_method("scaffold", scaffold__option="I")
    method.vectors |= {"expert.0": flat(1.0), "variate": flat(0.5)}
    method.planned(3, [], [1, 6])
    huge = [reply(1, expert_0=0.4, steps=12, variate_1=3e38), reply(6, expert_0=1.6, steps=4, variate_6=3e38)]
    method.merged(huge, server_round=3)
    assert set(method.vectors) == {"expert.0", "variate"}
    assert_full(method.vectors["variate"], 0.5)
    assert_full(method.vectors["expert.0"], (0.4 + 1.6) / 2)


def test_with_noise_the_draw_is_from_all_and_who_opted_out_is_not_asked() -> None:
    """Else the others would be drawn more often than is told."""
    method = tiny_method("fedjets", privacy__noise_multiplier=1.0).strategy
    before = [method.cohort(r) for r in range(1, 9)]
    method.opted_out = frozenset({1, 4, 5})
    assert [method.cohort(r) for r in range(1, 9)] == before


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_variates_of_option_two_are_made_of_the_models(momentum: float) -> None:
    """c_i - c + (x - y) / (K lr); round 3 of 4 has half the rate of 0.3, and momentum 1/2 moves a model in 12 steps
    as far as sum_{j=1..12} (1 - 2^-j) / (1 - 1/2) plain steps do."""
    method = tiny_method("scaffold", train__momentum=momentum)
    two_clients(method, "II")
    steps = {n: sum((1 - momentum**j) / (1 - momentum) for j in range(1, n + 1)) for n in (12, 4)}
    first = 2.0 - 0.5 + (1 - 0.4) / (steps[12] * 0.15)
    second = 0.0 - 0.5 + (1 - 1.6) / (steps[4] * 0.15)
    wanted = {"variate.1": first, "variate.6": second, "variate": 0.5 + ((first - 2) + (second - 0)) / 7}
    for name, value in wanted.items():
        assert_full(method.vectors[name], value)


def test_batch_norms_statistics_are_no_part_of_a_variate() -> None:
    method = tiny_method("scaffold", moe__trainable="all", moe__init="common", train__schedule="constant")
    size, trained = method.strategy.specs["expert.0"].size, method.strategy.specs["expert.0"].trained
    assert trained < size
    start = method.vectors["expert.0"].clone()
    jobs = method.planned(1, [], [1])
    assert method.strategy.outgoing(jobs)["correction.1"].shape == (trained,)
    moved = start - 1
    method.merged([reply(1, expert_0=moved, steps=12)])
    assert method.vectors["variate.1"].shape == (trained,)
    steps = sum(2 * (1 - 0.5**j) for j in range(1, 13))
    torch.testing.assert_close(method.vectors["variate.1"], torch.full((trained,), 1 / (0.3 * steps)))


def test_variates_stay_where_the_model_stays() -> None:
    method = tiny_method("scaffold", limits__min_replies=3)
    before = set(method.vectors)
    two_clients(method, "II")
    assert set(method.vectors) == before | {"variate.1", "variate.4"}
    assert_full(method.vectors["variate.1"], 2.0)
    assert_full(method.vectors["variate"], 0.5)


def test_a_variate_that_is_not_finite_is_left_out_alone() -> None:
    """From the largest float to its negative the model moves by more than a float holds."""
    method = tiny_method("scaffold")
    method.vectors["expert.0"] = flat(3e38)
    method.planned(1, [], [1, 6])
    method.merged([reply(1, expert_0=-3e38, steps=12), reply(6, expert_0=3e38, steps=4)])
    assert "variate.1" not in method.vectors
    assert_full(method.vectors["variate.6"], 0.0)
    assert_full(method.vectors["variate"], 0.0)


def test_a_client_that_never_trained_has_a_variate_of_zero() -> None:
    method = tiny_method("scaffold")
    assert_full(method.strategy.variate(3), 0.0)
    assert method.strategy.variate(3).shape == method.vectors["variate"].shape
    method.vectors["variate.3"] = flat(2.0)
    assert_full(method.strategy.variate(3), 2.0)


def test_what_is_lost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    method = tiny_method("fedavg", limits__min_replies=2)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        method.merged([reply(0, expert_0=1.0)], server_round=6)
    assert "round 6" in caplog.text


def test_a_refusal_is_a_bad_reply() -> None:
    with pytest.raises(BadReply, match="num-examples"):
        tiny_method("fedavg").strategy.check(reply(0, 1.0, 19))
