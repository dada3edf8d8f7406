"""Models that clients make for themselves: local, fine-tuned, and what a client keeps and never sends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

import server_app.app
from client_app.algorithms import fedavg
from client_app.app import _train, app
from client_app.client import ClientContext, Update
from client_app.runtime import open_runtime
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client, open_global
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from strategies.fedavg import FedAvg
from tests.support.faults import OneClientANode, clients_of, same_weights, tampering
from tests.support.in_process import InProcessGrid
from tests.support.runs import TinyRunner, participants, tiny_run
from tests.support.tiny import tiny_runtime

__all__ = ["tiny_run"]

pytestmark = pytest.mark.runs

PARTS: dict[str, Scalar] = {
    "partition__val_share": 0.25, "partition__test_share": 0.25, "partition__samples_per_client": 40,
    "train__schedule": "constant", "adapt__lr": 0.02, "adapt__max_epochs": 12,
}  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the private files by client and round."""
    return {
        f"{p.parent.parent.name}/{p.name}": p.read_bytes() for p in sorted((folder / "private").rglob("*.safetensors"))
    }


# What they are --------------------------------------------------------------------------------------------------------


def test_local_moves_no_byte_and_asks_nobody_to_train(tiny_run: TinyRunner) -> None:
    run = tiny_run("local", **PARTS)
    results = read_recorded(run.config.run_dir).results
    assert {name: results[name] for name in ("bytes_down", "bytes_up", "bytes_served", "wire_bytes")} == {
        "bytes_down": 0, "bytes_up": 0, "bytes_served": 0, "wire_bytes": 0,
    }  # fmt: skip
    assert run.vectors == {}
    assert [record["cohort"] for record in read_metrics(run.config.run_dir)] == [[], [], []]
    assert results["accuracy"] is None
    assert set(results["participants"]["clients"]) == {str(c) for c in range(7)}
    assert results["score"]["value"] == results["participants"]["local"]


def test_finetune_is_fedavg_and_its_model_goes_once_to_each_client_that_is_scored(tiny_run: TinyRunner) -> None:
    tuned, plain = tiny_run("finetune", **PARTS), tiny_run("fedavg", **PARTS)
    assert same_weights(tuned, plain)
    a, b = (read_recorded(run.config.run_dir).results for run in (tuned, plain))
    for name in ("bytes_down", "bytes_up", "bytes_served", "accuracy"):
        assert a[name] == b[name]
    unseen = sum(1 for r in read_metrics(plain.config.run_dir) if "evaluation" in r) * 2
    assert b["bytes_served"] == 4 * plain.vectors["expert.0"].numel() * (unseen + 7)


def test_without_an_epoch_fine_tuned_models_answer_as_the_global_one(tiny_run: TinyRunner) -> None:
    none: dict[str, Scalar] = PARTS | {"adapt__max_epochs": 0}
    assert participants(tiny_run("finetune", **none)) == participants(tiny_run("fedavg", **PARTS))


def test_both_learn_what_their_clients_hold(tiny_run: TinyRunner) -> None:
    """More than the global model on samples of one's own; less where all classes are asked for."""
    one, tuned, plain = (participants(tiny_run(name, **PARTS)) for name in ("local", "finetune", "fedavg"))
    assert one["local"] > plain["local"] + 0.05
    assert tuned["local"] > plain["local"] + 0.05
    assert len({tuple(counts["local"]) for counts in one["clients"].values()}) > 2


def test_a_local_model_depends_on_no_other_client(tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = participants(tiny_run("local", **PARTS))["clients"]
    few = participants(tiny_run("local", **PARTS, participants__clients=3))["clients"]
    assert len(few) == 3
    assert few == {client: whole[client] for client in few}


@pytest.mark.parametrize("nodes", [1, 2, 8])
@pytest.mark.parametrize("name", ["local", "finetune"])
def test_any_number_of_nodes_gives_the_same(tiny_run: TinyRunner, name: str, nodes: int) -> None:
    grid = type("Nodes", (OneClientANode,), {"nodes": nodes})
    assert participants(tiny_run(name, grid, **PARTS)) == participants(tiny_run(name, **PARTS))


def test_every_method_can_be_scored_on_its_participants(tiny_run: TinyRunner) -> None:
    """A gate chooses for them; that counts as served, and what training moves stays as it was."""
    run, without = tiny_run("fedjets", **PARTS), tiny_run("fedjets", **PARTS, participants__clients=1)
    assert set(participants(run)["clients"]) == {str(c) for c in range(7)}
    assert same_weights(run, without)
    a, b = (read_recorded(r.config.run_dir).results for r in (run, without))
    assert (a["bytes_down"], a["bytes_up"]) == (b["bytes_down"], b["bytes_up"])
    assert a["bytes_served"] > b["bytes_served"]


# What they refuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["local", "finetune"])
@pytest.mark.parametrize("part", ["val", "test"])
def test_they_need_parts_of_their_own(tiny_run: TinyRunner, name: str, part: str) -> None:
    with pytest.raises(FedjetsError, match=rf"partition.{part}-share = 0: strategy.name = '{name}' .* 0.2, say"):
        tiny_run(name, **PARTS | {f"partition__{part}_share": 0.0})


def test_a_client_that_never_trained_gets_no_local_model(tiny_run: TinyRunner) -> None:
    run = tiny_run("local", **PARTS)
    with pytest.raises(FedjetsError, match="strategy.name = 'local' keeps no model at the server"):
        open_run(run.config.run_dir)


@pytest.mark.parametrize("lie", [[3, 2], [0, 0], [1], [-1, 2], [1, 10**9]])
def test_a_count_that_cannot_be_harms_its_client_alone(tiny_run: TinyRunner, lie: list[int]) -> None:
    def tamper(kind: str, server_round: int, content: Any) -> None:
        if kind == "evaluate.finetune" and clients_of(content) == [2]:
            content.metric_records["client.2"]["local"] = lie

    run = tiny_run("finetune", tampering(tamper), **PARTS)
    assert set(participants(run)["clients"]) == {"0", "1", "3", "4", "5", "6"}
    assert "local" in read_metrics(run.config.run_dir)[-1]["failures"]["2"]


# Private state --------------------------------------------------------------------------------------------------------


class Listening(InProcessGrid):
    """Keeps every array and text that clients send."""

    heard: bytes = b""

    def change(self, reply: Message) -> Message:
        for record in reply.content.array_records.values():
            type(self).heard += b"".join(array.data for array in record.values())
        type(self).heard += repr([dict(r) for r in reply.content.metric_records.values()]).encode()
        return reply


def test_no_byte_of_a_local_model_is_sent(tiny_run: TinyRunner, tmp_path: Path) -> None:
    Listening.heard = b""
    tiny_run("local", Listening, **PARTS)
    assert b"'local'" in Listening.heard
    files = files_of(tmp_path / "cache")
    assert len(files) == 7
    for data in files.values():
        body = data[8 + int.from_bytes(data[:8], "little") :]
        assert len(body) == 4 * 50
        assert not any(body[i : i + 8] in Listening.heard for i in range(0, len(body), 4))


def test_a_local_model_is_trained_once_and_kept(tiny_run: TinyRunner, tmp_path: Path) -> None:
    run = tiny_run("local", **PARTS, participants__evaluate_every=1)
    records = read_metrics(run.config.run_dir)
    assert len({str(record["participants"]) for record in records}) == 1
    assert {name.split("/")[1] for name in files_of(tmp_path / "cache")} == {"round-000001-1.safetensors"}


def counter(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Train, and move by how often this client trained so far: the bits of a run depend on every state."""
    update, seen = fedavg.train(context, vectors), context.state.get("seen", torch.zeros(1))
    moved = {name: vector + 0.125 * seen for name, vector in update.vectors.items()}
    return Update(moved, update.numbers, {"seen": seen + 1})


class Counter(FedAvg):
    algorithm = "counter"
    keeps_state = True


app.train("counter")(_train(counter))


@pytest.fixture
def counting(tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    monkeypatch.setattr(server_app.app, "strategy", lambda name: Counter)
    return tiny_run


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_resumed_run_reads_the_states_of_its_checkpoint(counting: TinyRunner, tmp_path: Path, at: int) -> None:
    """States of later rounds, which the run that was cut off left, count for nothing."""
    keep: dict[str, Scalar] = {"train__schedule": "constant", "run__rounds": 6, "run__checkpoint_every": 1}
    keep |= {"run__keep_checkpoints": 6}
    whole = counting("fedavg", **keep, run__name="whole")
    wanted = files_of(tmp_path / "cache")
    assert len(wanted) > 7
    cut = counting("fedavg", **keep, run__name="cut")
    for path in (cut.config.run_dir / "checkpoints").glob("round-*"):
        if int(path.name.split("-")[1]) > at:
            path.unlink()
    again = counting("fedavg", **keep, run__name="cut", run__resume=True)
    assert same_weights(whole, again)
    assert not same_weights(whole, counting("fedavg", **keep, run__name="fresh", run__seed=2))


def test_a_fresh_run_in_the_same_folder_begins_without_state(counting: TinyRunner) -> None:
    first, second = (counting("fedavg", run__name="same", run__overwrite=again) for again in (False, True))
    assert same_weights(first, second)


def test_a_method_without_state_cannot_keep_any(tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app.app, "strategy", lambda name: Counter)
    monkeypatch.setattr(Counter, "keeps_state", False)
    with pytest.raises(FedjetsError, match="set keeps_state in its Strategy"):
        tiny_run("fedavg")


def test_nodes_that_do_not_share_the_servers_folder_are_refused(tiny_run: TinyRunner, tmp_path: Path) -> None:
    class Elsewhere(InProcessGrid):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.context.run_config["run.cache-dir"] = str(tmp_path / "elsewhere")

    with pytest.raises(FedjetsError, match=r"run.cache-dir = .*: nodes of the simulation do not see this folder"):
        tiny_run("local", Elsewhere, **PARTS)
    open_runtime.cache_clear()


# Parts of a client's samples ------------------------------------------------------------------------------------------


def test_parts_are_disjoint_over_all_clients_and_near_their_shares(tiny_run: TinyRunner) -> None:
    config = tiny_runtime(tiny_run.folder, **PARTS).config
    parts = {
        part: [open_client(config, client, part=part).images.pixels for client in range(7)]
        for part in ("train", "val", "test", "all")
    }
    for client in range(7):
        sizes = {part: len(images[client]) for part, images in parts.items()}
        assert sizes["train"] + sizes["val"] + sizes["test"] == sizes["all"]
        assert min(sizes.values()) > 0
    seen = {
        part: {bytes(image.numpy()) for images in parts[part] for image in images} for part in ("train", "val", "test")
    }
    total = sum(len(images) for images in parts["all"])
    assert 0.1 < sum(len(images) for images in parts["test"]) / total < 0.4
    assert len(seen["train"] | seen["val"] | seen["test"]) == sum(map(len, seen.values()))


def test_the_global_images_are_the_same_for_all_and_as_many_as_asked_for(tiny_run: TinyRunner) -> None:
    config = tiny_runtime(tiny_run.folder, **PARTS, participants__global_samples=50).config
    assert len(open_global(config).images) == 50
    assert torch.equal(open_global(config).images.pixels, open_global(config).images.pixels)
    assert len(open_global(tiny_runtime(tiny_run.folder, participants__global_samples=0).config).images) == 449


def test_a_part_that_would_be_empty_is_named(tiny_run: TinyRunner) -> None:
    few: dict[str, Scalar] = PARTS | {"partition__val_share": 0.001}
    with pytest.raises(
        FedjetsError, match=r"partition.val-share = 0.001, .* samples falls to val; .*samples-per-client"
    ):
        open_client(tiny_runtime(tiny_run.folder, **few).config, 0)


def test_a_client_s_model_cannot_start_as_another_kind_of_model(tiny_run: TinyRunner) -> None:
    """Nobody is scored then, and a run without a score is no result."""
    other: dict[str, Scalar] = {"adapt__start": "common", "moe__trainable": "all", "model__width": 4}
    with pytest.raises(FedjetsError, match=r"no client could be scored.*adapt\.start = 'common'"):
        tiny_run("local", **PARTS, **other)
