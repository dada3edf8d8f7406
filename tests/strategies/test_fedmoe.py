"""FedMoE and its control: whole runs on a small text, and the server's half by itself."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.pretraining import provide_common_expert
from fedjets_flwr.models.transformer import Sets, joined, sizes_of, vector_names, whole
from fedjets_flwr.moe.structure import Structure, count
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.messages import BadReply, Reply
from strategies.fedmoe import FedMoE
from strategies.randommoe import RandomMoE
from tests.support.in_process import Finished, InProcessGrid
from tests.support.text import Settings, TextRun, text_folder, text_run, text_settings

__all__ = ["text_folder", "text_run", "text_settings"]

EVERYTHING = {"fedmoe__memory": "1", "fedmoe__budget": 1.0, "fedmoe__probe": "none", "fedmoe__recommend": False}


class OneNodeAClient(InProcessGrid):
    """Each client answers in a message of its own."""

    def get_node_ids(self) -> list[int]:
        return [11, 12, 13]


def records(run: Finished) -> list[dict[str, Any]]:
    return read_metrics(run.config.run_dir)


def bits(run: Finished) -> list[float]:
    return [record["participants"]["bits_per_byte"] for record in records(run)]


def ran(run: Finished) -> FedMoE:
    assert isinstance(run.strategy, FedMoE)
    return run.strategy


def held(run: Finished) -> Mapping[int, Sets]:
    return {client: structure.held for client, structure in ran(run).structures.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedmoe", "randommoe"])
def test_bits_per_byte_fall(method: str, text_run: TextRun) -> None:
    done = text_run(method, run__rounds=5)
    assert bits(done)[-1] < bits(done)[0]
    told = json.loads((done.config.run_dir / "summary.json").read_text())
    assert told["score"]["name"] == "bits per byte on clients' own tests"
    assert {int(c): tuple(map(tuple, sets)) for c, sets in told["experts_held"].items()} == held(done)
    assert all(told["memory"][str(c)] == ran(done).memory(c) for c in range(3))


@pytest.mark.parametrize("counts", ["held"])
def test_who_holds_everything_does_fedavg_bit_for_bit(counts: str, text_run: TextRun) -> None:
    ours, theirs = text_run("fedmoe", fedmoe__counts=counts, **EVERYTHING), text_run("fedavg")
    sets = whole(ran(ours).whole)
    assert torch.equal(joined(ours.vectors, sets), theirs.vectors["expert.0"])
    assert bits(ours) == bits(theirs)
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert [mine[name] for name in ("loss", "bytes_down", "bytes_up")] == [
            other[name] for name in ("loss", "bytes_down", "bytes_up")
        ]


def test_one_expert_is_a_dense_model(text_run: TextRun) -> None:
    single = {"language_model__experts": 1}
    ours, theirs = text_run("fedmoe", fedmoe__counts="held", **EVERYTHING | single), text_run("fedavg", **single)
    assert torch.equal(joined(ours.vectors, ((0,), (0,))), theirs.vectors["expert.0"])


CHANGING = {"fedmoe__patience": 1, "fedmoe__memory": "1,0.6,0.75", "train__lr": 0.03, "run__rounds": 6}
"""So large a rate that scores often stand still."""


@pytest.mark.parametrize(
    ("changes", "changing"),
    [({}, False), ({"fedmoe__probe": "full", "fedmoe__memory": "1"}, True), ({"fedmoe__probe": "none"}, True)],
)
def test_one_node_or_many_give_the_same_bits(changes: dict[str, object], changing: bool, text_run: TextRun) -> None:
    one, many = (text_run("fedmoe", grid, **CHANGING | changes) for grid in (InProcessGrid, OneNodeAClient))
    assert same(one.vectors, many.vectors)
    assert one.strategy.notes() == many.strategy.notes()
    assert changing == (len({r["metrics"]["experts_mean"] for r in records(one)}) > 1)


class Breaks(InProcessGrid):
    """Ends the run in round 4, after some clients have answered."""

    def answer(self, message: Any) -> Any:
        if message.metadata.message_type == "train.fedmoe" and message.content["request"]["round"] == 4:
            raise SystemExit
        return super().answer(message)


@pytest.mark.parametrize("every", [1, 10])
def test_a_resumed_run_ends_as_an_unbroken_one(every: int, text_run: TextRun) -> None:
    changes = CHANGING | {"run__checkpoint_every": every, "fedmoe__probe": "none"}
    whole_run = text_run("fedmoe", run__name="whole", **changes)
    with pytest.raises(SystemExit):
        text_run("fedmoe", Breaks, run__name="broken", **changes)
    resumed = text_run("fedmoe", run__name="broken", run__resume=True, **changes)
    assert same(whole_run.vectors, resumed.vectors)
    assert whole_run.strategy.notes() == resumed.strategy.notes()
    assert bits(whole_run) == bits(resumed)
    assert any(structure.fixed for structure in ran(resumed).structures.values())


def test_bytes_are_those_of_what_clients_hold(text_run: TextRun) -> None:
    done = text_run("fedmoe", fedmoe__recommend=False, participants__evaluate_every=0)
    sizes, sets = sizes_of(ran(done).whole), held(done)
    full = sizes.of(2 * 4)
    first, second, _ = records(done)
    assert first["bytes_up"] == 4 * sum(sizes.of(count(sets[c])) for c in first["cohort"])
    # Once the whole model; what clients hold they have from then on, as it was.
    assert first["bytes_down"] == 4 * 3 * full
    changed = {name for name, trained in first["trained"].items() if trained}
    assert second["bytes_down"] == 4 * sum(
        sizes.dense + sizes.expert * len(changed.intersection(vector_names(sets[c])[1:])) for c in second["cohort"]
    )
    assert second["bytes_up"] < 4 * 3 * full


def test_sets_are_within_the_memory_and_hold_an_expert_a_layer(text_run: TextRun) -> None:
    done = text_run("fedmoe", **CHANGING)
    strategy = ran(done)
    for client, sets in held(done).items():
        assert strategy.bytes_of(count(sets)) <= strategy.memory(client)
        assert all(sets)
    small = text_run("fedmoe", fedmoe__recommend=False, fedmoe__memory="0.5,1", run__rounds=1)
    for client, sets in held(small).items():
        assert ran(small).bytes_of(count(sets)) <= 0.8 * ran(small).memory(client)


def test_without_stage_2_the_first_sets_stay(text_run: TextRun) -> None:
    short, long = (text_run("fedmoe", fedmoe__recommend=False, run__rounds=rounds) for rounds in (1, 4))
    assert held(short) == held(long)


def test_random_sets_tell_nothing_and_stay(text_run: TextRun) -> None:
    told: list[dict[str, object]] = []

    class Listens(InProcessGrid):
        def change(self, reply: Any) -> Any:
            told.extend(
                dict(record) for name, record in reply.content.metric_records.items() if name.startswith("client.")
            )
            return reply

    done = text_run("randommoe", Listens, fedmoe__counts="held")
    assert held(done) == held(text_run("randommoe", run__rounds=1))
    assert {count(sets) for sets in held(done).values()} == {ran(done).first(0)}
    names = {name for numbers in told for name in numbers}
    assert not names & {"activation", "used", "score"}


# The server's half ---------------------------------------------------------------------------------------------------


@pytest.fixture
def method(text_settings: Settings) -> FedMoE:
    """Three clients, two layers of four experts."""
    return made(text_settings, "fedmoe")


def made(text_settings: Settings, name: str, **changes: object) -> FedMoE:
    config = text_settings(strategy__name=name, **changes)
    common = provide_common_expert(config, lambda text: None)
    kind = {"fedmoe": FedMoE, "randommoe": RandomMoE}[name]
    found = kind(config, common, open_task(config))
    found.vectors = found.state()
    found.num_samples = {0: 10, 1: 30, 2: 20}
    found.weights = {0: 10.0, 1: 30.0, 2: 20.0}
    return found


def answer(client: int, activation: list[float] | None, domain: int = 0) -> Reply:
    numbers = {"domain": domain, "num-examples": 10} | ({} if activation is None else {"activation": activation})
    return Reply(client, {}, numbers)


UNEVEN = [0.5, 0.25, 0.25, 0.0, 0.0, 0.0, 0.125, 0.875]


def test_clients_are_asked_once_with_the_whole_model(method: FedMoE) -> None:
    jobs = method.questions(Cohort((), (1,), 1))
    assert [(job.client, job.vectors) for job in jobs] == [(c, vector_names(whole(method.whole))) for c in range(3)]
    method.learn([answer(0, UNEVEN), answer(2, UNEVEN)])
    assert [job.client for job in method.questions(Cohort((), (1,), 2))] == [1]
    assert not method.questions(Cohort((), (0, 2), 3))
    assert [job.client for job in method.plan(Cohort((), (0, 1), 2), {})] == [0]
    method.opted_out = frozenset({1})
    assert not method.questions(Cohort((), (1,), 4))


def test_a_client_without_the_memory_gets_the_mean_of_its_domain(text_settings: Settings) -> None:
    method = made(text_settings, "fedmoe", fedmoe__probe="full", fedmoe__memory="1,1,0.5", partition__anchors=1)
    assert [bool(job.vectors) for job in method.questions(Cohort((), (), 1))] == [True, True, False]
    other = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    method.learn([answer(0, UNEVEN), answer(1, other), answer(2, None)])
    mean = [x / 4 + 3 * y / 4 for x, y in zip(UNEVEN, other, strict=True)]  # 10 and 30 windows
    assert [x for row in method.structures[2].activation for x in row] == pytest.approx(mean)
    del method.structures[2], method.num_samples[1]  # after a resume, at which that one is not here
    method.learn([answer(2, None)])
    mean = [10 * x / 11 + y / 11 for x, y in zip(UNEVEN, other, strict=True)]
    assert [x for row in method.structures[2].activation for x in row] == pytest.approx(mean)
    method.num_samples[1] = 30
    method.structures = {}
    method.learn([answer(0, UNEVEN, 1), answer(1, other, 2), answer(2, None, 1)])
    assert [x for row in method.structures[2].activation for x in row] == UNEVEN


def test_memory_that_is_too_small_is_told_with_the_client_and_the_bytes(text_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match=r"fedmoe.memory = '1,0.01': client 1 may use \d+ bytes .* takes \d+; raise"):
        made(text_settings, "fedmoe", fedmoe__memory="1,0.01")
    alone = made(text_settings, "fedmoe", fedmoe__probe="full", fedmoe__memory="0.9")
    with pytest.raises(FedjetsError, match="no client has the .* bytes that fedmoe.probe = 'full' takes"):
        alone.learn([answer(0, None)])


@pytest.mark.parametrize("memory", ["", "x", "0", "1.5", "1,,1", "nan"])
def test_shares_that_are_none_are_refused(memory: str, text_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match="fedmoe.memory"):
        text_settings(fedmoe__memory=memory)


def test_fedmoe_needs_text(text_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match="data.name = 'digits': strategy.name = 'fedmoe' learns text"):
        FedMoE.validate(text_settings(strategy__name="fedmoe", data__name="digits"))


def reply_of(method: FedMoE, client: int, **changes: object) -> Reply:
    """A good reply of a client that holds the experts 0 and 1 of the first layer and 2 of the second."""
    names = vector_names(((0, 1), (2,)))
    numbers = {
        "num-examples": method.num_samples[client], "loss": 1.0, "score": 2.0,
        "activation": [0.75, 0.25, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0], "used": [9, 0, 0, 0, 0, 0, 9, 0],
    }  # fmt: skip
    return Reply(client, {name: method.vectors[name] + client + 1 for name in names}, numbers | changes)


@pytest.fixture
def placed(method: FedMoE) -> FedMoE:
    structure = Structure(((0, 1), (2,)), 6, ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)))
    method.structures = dict.fromkeys(range(3), structure)
    return method


def test_a_good_reply_passes_and_experts_without_a_token_do_not_count(placed: FedMoE) -> None:
    reply = reply_of(placed, 0)
    placed.check(reply)
    assert set(placed.averaged(reply)) == {"dense", "expert.0.0", "expert.1.2"}


def test_where_holding_counts_all_that_is_held_is_averaged(text_settings: Settings) -> None:
    method = made(text_settings, "fedmoe", fedmoe__counts="held")
    method.structures = {0: Structure(((0, 1), (2,)), 6)}
    reply = reply_of(method, 0)
    method.check(reply)
    assert set(method.averaged(reply)) == {"dense", "expert.0.0", "expert.0.1", "expert.1.2"}


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": [1.0] * 8}, {"activation": [0.5] * 4}, {"activation": "x"},
        {"activation": [0.75, 0.0, 0.25, 0.0, 0.0, 0.0, 1.0, 0.0]}, {"activation": [2.0, -1.0, 0, 0, 0, 0, 1.0, 0]},
        {"activation": [float("nan")] * 8}, {"used": [0] * 7}, {"used": [-1, 0, 0, 0, 0, 0, 0, 0]},
        {"used": [0, 0, 1, 0, 0, 0, 0, 0]}, {"score": -1.0}, {"score": float("nan")}, {"score": "x"},
        {"num-examples": 999}, {"loss": float("inf")},
    ],
)  # fmt: skip
def test_replies_that_cannot_be_are_refused(changes: dict[str, object], placed: FedMoE) -> None:
    with pytest.raises(BadReply):
        placed.check(reply_of(placed, 1, **changes))


@pytest.mark.parametrize("changes", [{"domain": 3}, {"domain": -1}, {"activation": [0.1] * 8}, {"activation": []}])
def test_answers_that_cannot_be_are_refused(changes: dict[str, object], method: FedMoE) -> None:
    good = answer(0, UNEVEN)
    method.check_answer(good)
    with pytest.raises(BadReply):
        method.check_answer(replace(good, numbers={**good.numbers, **changes}))


def test_an_answer_that_was_not_asked_for_is_looked_at_as_well(text_settings: Settings) -> None:
    """A client without the memory to find out tells its shares all the same: they must not end the run."""
    method = made(text_settings, "fedmoe", fedmoe__probe="full", fedmoe__memory="1,1,0.5", partition__anchors=1)
    method.check_answer(answer(2, None))
    with pytest.raises(BadReply):
        method.check_answer(answer(2, [2.0]))


def test_notes_are_json_and_bring_everything_back(placed: FedMoE) -> None:
    placed.domains = {0: 1, 2: 0}
    notes = json.loads(json.dumps(placed.notes()))
    structures = placed.structures
    placed.structures, placed.domains = {}, {}
    placed.recall(notes)
    assert (placed.structures, placed.domains) == (structures, {0: 1, 2: 0})


def test_a_round_too_few_answered_changes_no_structure(placed: FedMoE) -> None:
    before = dict(placed.structures)
    placed.after_merge(1)
    assert placed.structures == before
    reply = reply_of(placed, 1)
    placed.merge({}, placed.kept(2, reply))
    placed.after_merge(2)
    assert placed.structures[1].best == 2.0
    assert placed.structures[1].activation == ((0.75, 0.25, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    placed.after_merge(3)
    assert placed.structures[1].waits == 0  # a report counts once


@pytest.mark.parametrize("rule", ["median", "clip"])
def test_attackers_are_met_by_robust_rules_vector_by_vector(rule: str, text_run: TextRun) -> None:
    done = text_run("fedmoe", attack__kind="sign-flip", attack__share=0.3, aggregation__rule=rule)
    assert all(bool(vector.isfinite().all()) for vector in done.vectors.values())
    assert not any(record["failures"] for record in records(done))


def test_only_models_of_images_are_opened_for_personalising(text_run: TextRun) -> None:
    done = text_run("fedmoe", run__rounds=1)
    with pytest.raises(FedjetsError, match="a run of language models; `fedjets personalize --text` makes"):
        open_run(done.config.run_dir)


def test_noise_that_would_not_cover_what_clients_tell_is_refused(text_run: TextRun) -> None:
    with pytest.raises(FedjetsError, match="privacy.noise-multiplier"):
        text_run("fedmoe", privacy__noise_multiplier=1.0)


def test_clients_that_opted_out_are_not_asked(text_run: TextRun) -> None:
    done = text_run("fedmoe", partition__opt_out=0.4)
    assert len(done.strategy.opted_out) == 1
    assert not done.strategy.opted_out & ran(done).structures.keys()
    sizes = sizes_of(ran(done).whole)
    mean = sum(count(sets) for sets in held(done).values()) / 2
    assert done.strategy.trained_parameters == sizes.dense + mean * sizes.expert
    nobody = text_run("fedmoe", partition__opt_out=1.0, run__rounds=1)
    assert not ran(nobody).structures
    assert not records(nobody)[0]["cohort"]


def test_a_client_that_fails_the_question_is_a_failure_and_is_asked_again(text_run: TextRun) -> None:
    class Forgets(InProcessGrid):
        """Client 1's answer to the first question is cut."""

        def change(self, reply: Any) -> Any:
            if reply.metadata.message_type == "query.fedmoe" and self.sent < 5:
                del reply.content["client.1"]
            return reply

    done = text_run("fedmoe", Forgets, limits__max_failure_share=0.9)
    first, second, _ = records(done)
    assert list(first["failures"]) == ["1"]
    assert not second["failures"]
    assert set(held(done)) == {0, 1, 2}
