"""Sites with image folders of their own: the real apps, one node for each client as in a deployment."""

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ray
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from client_app.node import read_node
from client_app.runtime import open_runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data import image_folder
from fedjets_flwr.data.clients import open_client, open_dataset
from fedjets_flwr.data.image_folder import cached_images
from fedjets_flwr.data.site_cache import site_folder
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.pretraining import pretrain, save_common_expert
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.nodes import in_simulation
from server_app.app import run
from tests.support.in_process import Finished, InProcessGrid

DIGITS: dict[str, Scalar] = {
    "partition.clients": 6, "partition.unseen-clients": 2, "partition.samples-per-client": 40, "moe.experts": 5,
    "partition.unseen-samples": 20, "common-expert.target-accuracy": 0.3, "cohort.normals": 1, "run.rounds": 3,
    "run.evaluate-every": 2, "moe.init": "common",
}  # fmt: skip
CLASSES = ",".join(f"digit {number}" for number in range(10))


def write_site(config: Config, client: int, folder: Path, labelled: bool = True) -> Path:
    """Write a client's digits as PNG files, in class folders or flat."""
    images = open_client(config, client).images
    names = CLASSES.split(",")
    for position, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        path = folder / (names[label] if labelled else "") / f"{position:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(path)
    return folder


class Deployed(InProcessGrid):
    """One node for each site."""

    def __init__(self, config: Config, nodes: dict[int, dict[str, Scalar]]) -> None:
        super().__init__(config)
        self.contexts = {n: Context(1, n, facts, RecordDict(), config.flat()) for n, facts in nodes.items()}
        self.kinds: list[tuple[str, int]] = []

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            self.context = self.contexts[message.metadata.dst_node_id]
            arrays = message.content.array_records.get("vectors", {})
            self.kinds.append((message.metadata.message_type, len(arrays)))
            ids += super().push_messages([message])
        return ids

    def change(self, reply: Message) -> Message:
        vars(reply.metadata).update(_src_node_id=self.context.node_id)
        return reply


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training sites, an unseen one with labels and one without, and a common expert."""
    folder = tmp_path_factory.mktemp("sites")
    config = Config.from_flat(DIGITS)
    save_common_expert(pretrain(config, lambda text: None), folder / "common.safetensors")
    for client in range(8):
        write_site(config, client, folder / str(client), labelled=client != 7)
    return folder


def settings(sites: Path, folder: Path, **changes: Scalar) -> Config:
    flat: dict[str, Scalar] = {
        **DIGITS, "data.name": "image-folder", "data.classes": CLASSES, "data.channels": 1, "data.size": 8,
        "data.dir": str(folder / "nothing"), "common-expert.path": str(sites / "common.safetensors"),
        "run.output-dir": str(folder), "run.name": "deployed", "run.cache-dir": str(folder / "server-cache"),
        "limits.node-seconds": 5.0,
    }  # fmt: skip
    return Config.from_flat(flat | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})


def deploy(sites: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Scalar) -> tuple[Finished, Deployed]:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1, raising=False)
    config = settings(sites, folder, **changes)
    nodes: dict[int, dict[str, Scalar]] = {
        10 + c: {"client-id": c, "data-path": str(sites / str(c)), "role": "train" if c < 6 else "unseen",
                 "cache-dir": str(folder / f"cache{c}")}
        for c in range(8)
    }  # fmt: skip
    grid = Deployed(config, nodes)
    checkpoints = Checkpoints(config)
    return Finished(run(grid, config, checkpoints), checkpoints), grid


def test_sites_train_on_their_own_images(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, grid = deploy(sites, tmp_path, monkeypatch)
    records = read_metrics(method.config.run_dir)
    assert [record["failures"] for record in records] == [{}, {}, {}]
    assert (method.rounds.clients.unseen, method.rounds.clients.unlabelled) == ([6], [7])
    assert list(records[-1]["evaluation"]["per_client_accuracy"]) == ["6"]
    assert len(records[-1]["served"]["7"]) == 2
    # A normal client got the gate when it chose: it is not sent again with the experts.
    assert method.exchange.moved > 0
    routed = [count for kind, count in grid.kinds if kind == "query.route"]
    assert set(routed) <= {0, 1}
    # Embeddings, decoded images and vectors lie in the site's own cache, nothing in the server's.
    assert {path.name for path in (tmp_path / "cache0").iterdir()} == {
        "audit.jsonl", "audit.jsonl.head", "common-experts", "folders", "vectors"
    }  # fmt: skip
    assert not (tmp_path / "server-cache" / "embeddings").exists()


def test_what_a_site_holds_is_not_sent_again(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a gate that nobody trains, it travels once to each client; the bits are those of a run that resends."""
    once, grid = deploy(sites, tmp_path / "once", monkeypatch, gate__mode="random", moe__trainable="head")
    gates = [name for name in once.vectors if name == "gate"]
    assert gates == ["gate"]
    routes = [count for kind, count in grid.kinds if kind == "query.route"]
    assert sum(routes) == 3  # one normal client and two unseen ones
    with monkeypatch.context() as forgetful:
        forgetful.setattr(
            "fedjets_flwr.wire.vector_cache.VectorLedger.missing", lambda self, client, versions: list(versions)
        )
        again, other = deploy(sites, tmp_path / "again", monkeypatch, gate__mode="random", moe__trainable="head")
    assert sum(count for _, count in other.kinds) > sum(count for _, count in grid.kinds)
    assert all(once.vectors[name].equal(again.vectors[name]) for name in once.vectors)
    assert once.exchange.traffic.down < again.exchange.traffic.down


def test_a_site_that_lost_its_vectors_fails_once(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(Deployed):
        lost = False

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            for message in messages:
                if (
                    message.metadata.message_type == "train.fedjets"
                    and message.metadata.dst_node_id == 15
                    and not self.lost
                ):
                    self.lost = True
                    shutil.rmtree(tmp_path / "cache5" / "vectors")
                    # the real engine turns a ClientApp's exception into an error reply; here it would end the test
                    message.content["keep"]["versions"] = []
            return super().push_messages(messages)

    monkeypatch.setattr("tests.data.test_image_folder.Deployed", Losing)
    method, _ = deploy(sites, tmp_path, monkeypatch, limits__max_failure_share=0.9)
    failures = [record["failures"] for record in read_metrics(method.config.run_dir)]
    assert list(failures[0]) == ["5"]
    assert failures[1:] == [{}, {}]


class FreshProcesses(Deployed):
    """Sites that start a process for every message, as deployed ones do; :meth:`before` changes them."""

    def before(self, client: int, kind: str, server_round: object) -> None:
        """Change a site before a message reaches it."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids: list[str] = []
        for message in messages:
            open_client.cache_clear()
            open_runtime.cache_clear()
            asked = message.content.config_records["request"].get("round")
            self.before(message.metadata.dst_node_id - 10, message.metadata.message_type, asked)
            ids += super().push_messages([message])
        return ids


def test_a_site_whose_folder_changes_fails_once_and_is_prepared_anew(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An anchor loses an image before it trains, the unseen client gains one before it is scored."""
    own = tmp_path / "sites"
    shutil.copytree(sites, own)

    class Changing(FreshProcesses):
        def before(self, client: int, kind: str, server_round: object) -> None:
            image = min((own / str(client)).rglob("*.png"))
            if (client, kind, server_round) == (3, "train.fedjets", 1):
                image.unlink()
            if (client, kind, server_round) == (6, "evaluate", 2):
                shutil.copy(image, image.with_name("new.png"))

    monkeypatch.setattr("tests.data.test_image_folder.Deployed", Changing)
    method, grid = deploy(own, tmp_path, monkeypatch, limits__max_failure_share=0.9, run__evaluate_every=1)
    records = read_metrics(method.config.run_dir)
    assert [list(record["failures"]) for record in records] == [["3"], ["6"], []]
    assert (method.num_samples[3], method.num_samples[6]) == (39, 21)
    assert list(records[-1]["evaluation"]["per_client_accuracy"]) == ["6"]
    assert len([kind for kind, _ in grid.kinds if kind == "query.prepare"]) == 8 + 2


@pytest.mark.parametrize("how", ["k-means", "farthest"])
def test_anchors_are_chosen_by_embeddings_and_kept_on_resume(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    changes: dict[str, Scalar] = {"cohort__anchor_selection": how, "run__checkpoint_every": 1}
    whole, _ = deploy(sites, tmp_path / "whole", monkeypatch, **changes)
    assert len(set(whole.anchors)) == 5
    assert set(whole.anchors) <= set(range(6))
    deploy(sites, tmp_path / "cut", monkeypatch, run__rounds=2, **changes)
    resumed, _ = deploy(sites, tmp_path / "cut", monkeypatch, run__resume=True, **changes)
    assert resumed.anchors == whole.anchors
    assert all(resumed.vectors[name].equal(whole.vectors[name]) for name in whole.vectors)


def test_float16_halves_the_bytes(sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, _ = deploy(sites, tmp_path / "32", monkeypatch)
    half, _ = deploy(sites, tmp_path / "16", monkeypatch, transport__dtype="float16")
    assert 2 * half.exchange.traffic.down == full.exchange.traffic.down
    assert 2 * half.exchange.traffic.up == full.exchange.traffic.up
    for name, vector in full.vectors.items():
        assert not half.vectors[name].equal(vector)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "give client-id, a number from 0 to 7"),
        ({"client-id": 8}, "give client-id, a number from 0 to 7"),
        ({"client-id": "3"}, "give client-id"),
        ({"client-id": 3, "role": "unseen"}, "role='unseen' does not fit client-id=3: training clients are 0 to 5"),
        ({"client-id": 6, "role": "train"}, "role='train' does not fit client-id=6"),
        ({"client-id": 6, "datapath": "x"}, "no such key datapath"),
    ],
)
def test_a_wrong_node_config_is_named(sites: Path, tmp_path: Path, facts: dict[str, Scalar], expected: str) -> None:
    with pytest.raises(FedjetsError, match="--node-config: ") as raised:
        read_node(facts, settings(sites, tmp_path), simulated=False)
    assert expected in str(raised.value)


def test_a_node_config_in_flowers_way(sites: Path, tmp_path: Path) -> None:
    node = read_node({"partition-id": 2, "num-partitions": 8}, settings(sites, tmp_path), simulated=False)
    assert (node.client, node.samples) == (2, None)
    with pytest.raises(FedjetsError, match="data-path is for data.name = 'image-folder'"):
        read_node({"client-id": 2, "data-path": "x"}, Config.from_flat({}), simulated=False)


def test_a_training_site_needs_labels_and_every_site_images(sites: Path, tmp_path: Path) -> None:
    config = settings(sites, tmp_path)
    with pytest.raises(FedjetsError, match="one folder for each class"):
        open_client(config, 0, sites / "7")
    with pytest.raises(FedjetsError, match="no such folder"):
        open_client(config, 0, sites / "nowhere")
    with pytest.raises(FedjetsError, match="give data-path"):
        open_client(config, 0)


def test_a_changed_folder_is_read_anew(sites: Path, tmp_path: Path) -> None:
    config, folder = settings(sites, tmp_path), tmp_path / "site"
    shutil.copytree(sites / "1", folder)
    count = len(open_client(config, 1, folder).images)
    (next(folder.rglob("*.png"))).unlink()
    open_client.cache_clear()
    assert len(open_client(config, 1, folder).images) == count - 1


def test_nothing_that_was_made_of_a_removed_image_stays_in_the_cache(sites: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "site", tmp_path / "cache"
    shutil.copytree(sites / "1", folder)
    classes, shape = tuple(CLASSES.split(",")), (1, 8, 8)
    cached_images(folder, classes, shape, cache)
    (embedding := site_folder(cache, folder) / "embeddings" / "old.safetensors").parent.mkdir()
    embedding.touch()
    cached_images(folder, classes, shape, cache)
    assert embedding.exists()  # the folder did not change
    (next(folder.rglob("*.png"))).unlink()
    cached_images(folder, classes, shape, cache)
    assert len(list((cache / "folders").rglob("*.safetensors"))) == 1


def test_what_is_still_made_of_older_files_is_not_taken_for_the_new_ones(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is removed, and another process is done with the new folder, while one still decodes the old one."""
    folder, cache, classes, shape = tmp_path / "site", tmp_path / "cache", tuple(CLASSES.split(",")), (1, 8, 8)
    shutil.copytree(sites / "1", folder)
    read, counts = image_folder.read_folder, list[int]()

    def slow(*arguments: Any) -> image_folder.Folder:
        found = read(*arguments)
        if not counts:
            counts.append(len(found.images))
            next(folder.rglob("*.png")).unlink()
            counts.append(len(cached_images(folder, classes, shape, cache)))
        return found

    monkeypatch.setattr(image_folder, "read_folder", slow)
    cached_images(folder, classes, shape, cache)
    assert len(cached_images(folder, classes, shape, cache)) == counts[1] == counts[0] - 1


def test_runs_of_other_sizes_keep_their_images_of_a_folder_side_by_side(sites: Path, tmp_path: Path) -> None:
    folder, cache, classes = sites / "1", tmp_path / "cache", tuple(CLASSES.split(","))
    for side in (8, 16):
        assert cached_images(folder, classes, (1, side, side), cache).pixels.shape[1:] == (1, side, side)
    kept = {path: path.stat().st_mtime_ns for path in (cache / "folders").rglob("*.safetensors")}
    assert len(kept) == 2
    for side in (8, 16):
        cached_images(folder, classes, (1, side, side), cache)
    assert kept == {path: path.stat().st_mtime_ns for path in (cache / "folders").rglob("*.safetensors")}


def test_a_broken_image_costs_itself(sites: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, classes, shape = tmp_path / "site", tuple(CLASSES.split(",")), (1, 8, 8)
    shutil.copytree(sites / "1", folder)
    whole = cached_images(folder, classes, shape, tmp_path / "cache")
    first = min(folder.rglob("*.png"))
    (first.parent / "link.png").symlink_to(tmp_path / "nowhere.png")
    (first.parent / "ring.png").symlink_to(first.parent / "ring.png")
    first.write_bytes(first.read_bytes()[:30])
    rest = cached_images(folder, classes, shape, tmp_path / "cache")
    assert torch.equal(rest.pixels, whole.pixels[1:])
    assert torch.equal(rest.labels, whole.labels[1:])
    assert f"1 of {len(whole)} images are left out, the first is {first}: not a readable image" in caplog.text
    for path in folder.rglob("*.png"):
        path.unlink()
    first.write_bytes(b"nothing")
    with pytest.raises(FedjetsError, match="not a readable image"):
        cached_images(folder, classes, shape, tmp_path / "cache")


def test_a_damaged_file_of_decoded_images_is_made_anew(
    sites: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes, shape = tuple(CLASSES.split(",")), (1, 8, 8)
    whole = cached_images(sites / "1", classes, shape, tmp_path)
    (path,) = (tmp_path / "folders").rglob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = cached_images(sites / "1", classes, shape, tmp_path)
    assert torch.equal(found.pixels, whole.pixels)
    assert path.read_bytes() == data
    assert "is damaged: it is made anew" in caplog.text


def test_shared_images_can_be_simulated(sites: Path, tmp_path: Path) -> None:
    """``data.dir`` with train/ and test/ is a data set like any other."""
    for split in ("train", "test"):
        for client in range(6):
            shutil.copytree(sites / str(client), tmp_path / "images" / split, dirs_exist_ok=True)
    dataset = open_dataset(settings(sites, tmp_path, data__dir=str(tmp_path / "images")))
    assert dataset.shape == (1, 8, 8)
    assert len(dataset.train) == len(dataset.test) > 0
    assert dataset.classes == tuple(CLASSES.split(","))


def test_a_run_without_any_label_ends_well_and_draws_nothing(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = shutil.copytree(sites, tmp_path / "sites")
    for path in sorted((flat / "6").rglob("*.png")):
        path.rename(flat / "6" / path.name)
    for path in [path for path in (flat / "6").iterdir() if path.is_dir()]:
        path.rmdir()
    method, _ = deploy(flat, tmp_path, monkeypatch, run__rounds=1)
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["accuracy"], method.rounds.clients.unseen) == ("completed", None, [])
    assert set(summary["chosen"]) == {"6", "7"}
    assert draw_plots(method.config.run_dir) == []


def test_a_half_imported_ray_is_no_simulation_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulation imports Ray in one thread while the ServerApp starts in another."""
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert not in_simulation()
