"""The loop around a method's rounds: what it records and keeps, how it goes on, and clients that fail."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, MetricRecord, RecordDict
from torch import Tensor

import client_app.app
import server_app.preparation
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import draw_cohort
from fedjets_flwr.runs.checkpoint import Checkpoints, newest_vectors
from fedjets_flwr.runs.tracking import BYTES, read_metrics, read_warnings
from fedjets_flwr.seeds import derive
from tests.support.faults import clients_of, same_weights, tampering
from tests.support.in_process import Finished, InProcessGrid
from tests.support.runs import TinyRunner
from tests.support.tiny import EXPERTS, samples_of

CONSTANT: dict[str, Scalar] = {"train__schedule": "constant", "run__name": "run"}


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    return TinyRunner(tmp_path, monkeypatch)


def records(method: Finished) -> list[dict[str, Any]]:
    return read_metrics(method.config.run_dir)


def checkpoints(folder: Path) -> list[int]:
    """Return the rounds of a run's checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("round-*"))


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


# What is recorded and kept --------------------------------------------------------------------------------------------


def test_the_seconds_of_a_round_are_those_of_its_parts(tiny_run: TinyRunner) -> None:
    """Normal clients of round 2 choose in round 2; those of round 3 did when the unseen clients were asked."""
    method = tiny_run("fedjets", run__rounds=4, cohort__sampling="anchored", run__inspect_every=4)
    found = [record["seconds"] for record in records(method)]
    parts = {"train", "aggregate", "transport", "round"}
    assert [set(seconds) for seconds in found] == [
        parts | {"select"}, parts | {"select", "evaluate"}, parts, parts | {"select", "evaluate", "inspect"},
    ]  # fmt: skip
    for seconds in found:
        assert all(0 < value < 30 for value in seconds.values())
        assert seconds["round"] > seconds["train"] > seconds["aggregate"]
        assert seconds["round"] > seconds.get("evaluate", 0.0) + seconds.get("inspect", 0.0)
    for part in parts - {"round"}:
        assert sum(seconds[part] for seconds in found) == pytest.approx(method.rounds.watch.seconds[part])


def test_bytes_of_a_round_are_counted_from_its_start(tiny_run: TinyRunner) -> None:
    """Five clients get and give back a linear expert of 50 numbers; nothing else moves but for two unseen clients."""
    found = records(tiny_run("fedavg"))
    assert [(r["bytes_down"], r["bytes_up"]) for r in found] == [(5 * 50 * 4, 5 * 50 * 4)] * 3
    assert [r["bytes_served"] for r in found] == [0, 2 * 50 * 4, 2 * 50 * 4]
    assert [r["failures"] for r in found] == [{}] * 3


def test_looking_at_every_expert_costs_a_method_nothing(tiny_run: TinyRunner) -> None:
    """What unseen clients were shown for it they do not hold: an expert that one is served later travels to it."""
    changes: dict[str, Scalar] = {
        "cohort__sampling": "anchored", "cohort__anchors": 1, "cohort__normals": 0, "run__evaluate_every": 1,
        "gate__lr": 5.0, "run__rounds": 6,
    }  # fmt: skip
    with_it, without = (records(tiny_run("fedjets", run__inspect_every=every, **changes)) for every in (1, 0))
    assert ["inspection" in record for record in with_it] == [True] * 6
    assert [{n: r[n] for n in BYTES} for r in with_it] == [{n: r[n] for n in BYTES} for r in without]


def test_checkpoints_are_kept_every_so_many_rounds_and_after_the_last(tiny_run: TinyRunner) -> None:
    """The best on the unseen clients is kept beside them."""
    method = tiny_run("fedavg", run__checkpoint_every=10)
    assert checkpoints(method.config.run_dir) == [3]
    assert same(newest_vectors(method.config.run_dir / "checkpoints"), method.vectors)
    assert (method.config.run_dir / "checkpoints" / "best.safetensors").is_file()
    method = tiny_run("fedavg", run__checkpoint_every=1, run__keep_checkpoints=5)
    assert checkpoints(method.config.run_dir) == [1, 2, 3]


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), [("scaffold", {}), ("fedjets", {"cohort__anchor_selection": "farthest"})])
def test_a_run_goes_on_from_its_newest_checkpoint(
    tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Scalar]
) -> None:
    """What was recorded after it is done again, and anchors are not chosen anew."""
    keep: dict[str, Scalar] = CONSTANT | {"run__checkpoint_every": 1, **changes}
    whole = tiny_run(name, **keep)
    _, second, newest = sorted((whole.config.run_dir / "checkpoints").glob("*.safetensors"))
    newest.unlink()
    monkeypatch.setattr(server_app.preparation, "select_anchors", None)
    again = tiny_run(name, **keep, run__resume=True)
    assert same_weights(whole, again)
    assert again.anchors == whole.anchors
    assert [record["round"] for record in records(again)] == [1, 2, 3]
    assert second.is_file()


def test_anchors_are_drawn_from_the_seed_of_the_run(tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, config = [], tiny_run("fedavg", run__rounds=1).config

    def select(means: Mapping[int, Tensor], count: int, how: str, seed: int) -> tuple[int, ...]:
        asked.append((set(means), count, how, seed))
        for client, mean in means.items():
            wanted = torch.from_numpy(samples_of(config, client).h.mean(axis=0)).float()
            torch.testing.assert_close(mean, wanted)
        return (2, 4, 6)

    monkeypatch.setattr(server_app.preparation, "select_anchors", select)
    method = tiny_run("fedjets", cohort__anchor_selection="k-means", run__rounds=1)
    assert asked == [(set(range(7)), EXPERTS, "k-means", derive(1, "anchors"))]
    assert method.anchors == (2, 4, 6)


# Clients that fail ----------------------------------------------------------------------------------------------------


def test_clients_that_are_prepared_in_parts_are_those_prepared_at_once(
    tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine clients, four at a time: their sizes, the anchors by their mean embeddings, the controls, all bits."""
    found = []
    for at_once in (9, 4):
        monkeypatch.setattr(server_app.preparation, "AT_ONCE", at_once)
        run = tiny_run("fedjets", cohort__anchor_selection="farthest")
        summary = json.loads((run.config.run_dir / "summary.json").read_text())
        told = [summary[name] for name in ("controls", "common_expert_per_client", "weights_hash", "anchors")]
        found.append((run.strategy.num_samples, told))
    assert found[0] == found[1]
    assert len(found[0][0]) == 9


def test_a_client_that_could_not_be_prepared_is_prepared_when_it_is_drawn(tiny_run: TinyRunner) -> None:
    """It embeds its data late, and the run ends with the bits of one in which it was there from the start."""
    first = iter([True])

    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        late = kind == "query.prepare" and clients_of(content) == [0] and next(first, False)
        return "no disk" if late else None

    method = tiny_run("fedavg", tampering(tamper))
    assert any(0 in record["cohort"] for record in records(method))
    assert [record["failures"] for record in records(method)] == [{}] * 3
    assert method.num_samples == {client: len(samples_of(method.config, client)) for client in (*range(1, 9), 0)}
    assert same_weights(method, tiny_run("fedavg"))


@pytest.mark.parametrize(("name", "client"), [("fedjets", 1), ("fedjets", 5), ("fedavg", 0)])
def test_a_client_that_can_never_be_prepared_counts_as_failed_where_it_is_drawn(
    tiny_run: TinyRunner, name: str, client: int
) -> None:
    """Anchor or normal; the others train."""

    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        return "no disk" if kind == "query.prepare" and clients_of(content) == [client] else None

    method = tiny_run(name, tampering(tamper))
    found = records(method)
    drawn = [client in record["cohort"] for record in found]
    assert any(drawn)
    wanted = {str(client): "could not be prepared: no disk"}
    assert [record["failures"] for record in found] == [wanted if here else {} for here in drawn]
    assert client not in method.num_samples
    assert all(sum(record["trained"].values()) > 2 for record in found)


def test_a_round_that_fails_leaves_a_checkpoint_of_the_one_before(tiny_run: TinyRunner) -> None:
    settings: dict[str, Scalar] = CONSTANT | {"run__checkpoint_every": 10}

    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        return "no memory" if kind.startswith("train") and server_round == 3 else None

    with pytest.raises(FedjetsError, match="round 3: 5 of 5 clients failed"):
        tiny_run("scaffold", tampering(tamper), **settings)
    folder = tiny_run.folder / "runs" / "run"
    assert checkpoints(folder) == [2]
    kept = newest_vectors(folder / "checkpoints")
    assert same(kept, tiny_run("scaffold", **settings | {"run__name": "two"}, run__rounds=2).vectors)


def test_a_full_disk_does_not_hide_why_a_round_failed(tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        return "no memory" if kind.startswith("train") else None

    def save(self: Checkpoints, server_round: int, vectors: object, record: Mapping[str, Any], last: bool) -> None:
        assert (server_round, dict(record), last) == (0, {}, True)
        raise FedjetsError("no room")

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(FedjetsError, match="round 1: 5 of 5 clients failed"):
        tiny_run("fedavg", tampering(tamper))


def test_an_unseen_clients_bad_counts_are_left_out_alone(tiny_run: TinyRunner) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        if kind == "evaluate" and clients_of(content) == [8] and server_round == 2:
            content["client.8"] = MetricRecord({**content.metric_records["client.8"], "num-examples": 12})
        return None

    found = records(tiny_run("fedjets", tampering(tamper), run__evaluate_every=1))
    assert [set(record["evaluation"]["per_client_accuracy"]) for record in found] == [{"7", "8"}, {"7"}, {"7", "8"}]
    reason = "bad reply: num-examples: not the 13 that the client was prepared with"
    assert [record["failures"] for record in found] == [{}, {"8": reason}, {}]


@pytest.mark.parametrize("kind", ["train.fedavg", "evaluate"])
def test_a_client_that_holds_other_data_by_now_is_prepared_anew_before_the_next_round(
    tiny_run: TinyRunner, kind: str
) -> None:
    """Training or unseen; it fails once, and one preparation is enough."""
    asked: list[tuple[str, int]] = []

    def tamper(message_type: str, server_round: int, content: RecordDict) -> str | None:
        for client in clients_of(content):
            asked.append((message_type, client))
            if message_type == kind and server_round == 1 and client in (0, 8):
                record = content.metric_records[f"client.{client}"]
                content[f"client.{client}"] = MetricRecord({**record, "num-examples": 12})
        return None

    whole = {"cohort__sampling": "uniform", "cohort__normals": 4, "cohort__anchors": 3, "run__evaluate_every": 1}
    run = tiny_run("fedavg", tampering(tamper), **whole)
    changed = 8 if kind == "evaluate" else 0
    assert [set(record["failures"]) for record in records(run)] == [{str(changed)}, set(), set()]
    prepared = [client for message_type, client in asked if message_type == "query.prepare"]
    assert sorted(prepared) == sorted([*range(9), changed])
    assert prepared[-1] == changed
    last = len(asked) - 1 - asked[::-1].index(("query.prepare", changed))
    assert asked[last - 1][0] == "evaluate"  # between two rounds
    assert run.rounds.clients.changed == set()


def test_all_unseen_clients_may_be_prepared_anew_but_after_the_last_round(tiny_run: TinyRunner) -> None:
    """Where there is a round more the run goes on without a score; after the last there is nothing left to go on to."""

    def tampered(at: int) -> type[InProcessGrid]:
        def tamper(message_type: str, server_round: int, content: RecordDict) -> str | None:
            for client in clients_of(content) if (message_type, server_round) == ("evaluate", at) else []:
                record = content.metric_records[f"client.{client}"]
                content[f"client.{client}"] = MetricRecord({**record, "num-examples": 1})
            return None

        return tampering(tamper)

    found = records(tiny_run("fedavg", tampered(2), run__evaluate_every=1))
    assert ["evaluation" in record for record in found] == [True, False, True]
    with pytest.raises(FedjetsError, match="round 3: no unseen client answered"):
        tiny_run("fedavg", tampered(3), run__evaluate_every=1)


def test_a_round_records_which_vectors_it_left_as_they_were_and_why(tiny_run: TinyRunner) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        if kind.startswith("train") and server_round == 2:
            for name in content.array_records:
                vectors = content.array_records[name]
                for key, array in list(vectors.items()):
                    huge = np.full(array.shape, 3e38, np.float32)  # finite, but together they are not
                    vectors[key] = Array(array.dtype, array.shape, array.stype, huge.tobytes())
        return None

    found = records(tiny_run("fedavg", tampering(tamper), limits__max_growth=0.0))
    assert [record.get("left") for record in found] == [None, {"expert.0": "its mean is not finite"}, None]


def test_a_run_ends_where_no_unseen_client_answers(tiny_run: TinyRunner) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        return "no memory" if kind == "evaluate" else None

    with pytest.raises(FedjetsError, match="round 2: no unseen client answered"):
        tiny_run("fedavg", tampering(tamper))


def test_experts_are_chosen_for_unseen_clients_without_labels_too(tiny_run: TinyRunner) -> None:
    """Nothing scores them; what they would receive is recorded."""

    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        if kind == "query.prepare" and clients_of(content) == [8]:
            content["client.8"] = MetricRecord({**content.metric_records["client.8"], "labelled": 0})
        return None

    method, whole = tiny_run("fedjets", tampering(tamper)), tiny_run("fedjets")
    assert (method.rounds.clients.unseen, method.rounds.clients.unlabelled) == ([7], [8])
    assert (whole.rounds.clients.unseen, whole.rounds.clients.unlabelled) == ([7, 8], [])
    for record, wanted in zip(records(method)[1:], records(whole)[1:], strict=True):
        chosen = wanted["evaluation"]["chosen"]
        assert record["served"] == {"8": chosen["8"]}
        assert record["evaluation"]["chosen"] == {"7": chosen["7"]}
        assert "served" not in wanted


def test_nobody_to_score_is_no_error(tiny_run: TinyRunner) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> str | None:
        for client in (7, 8):
            if kind == "query.prepare" and clients_of(content) == [client]:
                record = content.metric_records[f"client.{client}"]
                content[f"client.{client}"] = MetricRecord({**record, "labelled": 0})
        return None

    found = records(tiny_run("fedjets", tampering(tamper)))
    assert set(found[-1]["served"]) == {"7", "8"}
    assert not {"evaluation", "inspection"} & set(found[-1])


@pytest.mark.parametrize("imitates", [True, False])
def test_a_precision_that_nodes_only_imitate_is_warned_of(
    tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, imitates: bool
) -> None:
    monkeypatch.setattr(client_app.app, "imitates_precision", lambda config: imitates)
    with caplog.at_level("WARNING", logger="flwr"):
        found = tiny_run("fedavg", run__rounds=1)
    warning = "train.precision = 'float32': the CPUs of 1 of 1 SuperNodes only imitate it"
    assert (warning in caplog.text) == imitates
    assert [text.startswith(warning) for text in read_warnings(found.config.run_dir)] == [True] * imitates


def test_cohorts_of_a_run_are_those_drawn(tiny_run: TinyRunner) -> None:
    method = tiny_run("fedjets", run__seed=5)
    wanted = [draw_cohort(method.config, server_round, "anchored", (0, 1, 2)) for server_round in (1, 2, 3)]
    assert [r["cohort"] for r in records(method)] == [cohort.clients for cohort in wanted]
    assert method.rounds.cohort == wanted[-1]
    config = json.loads((method.config.run_dir / "config.json").read_text())
    assert Config.from_flat(config).run.seed == 5
