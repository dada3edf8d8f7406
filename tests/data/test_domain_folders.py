"""Domains that are folders of images, as PACS or DomainNet lie on a disk: ``domain/class/*.png``."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client, open_dataset, open_public, open_split
from fedjets_flwr.data.datasets import load_dataset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.pretraining import _parts
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.tasks import open_task
from tests.support.in_process import run_in_process

CLASSES = ("0", "1", "2", "3")
DOMAINS = ("print", "negative")
EACH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of four classes, twenty of each; as they are and negative; there is no negative 3."""
    folder, digits = tmp_path_factory.mktemp("domains"), load_dataset("digits", Path(), False).train
    for label in range(len(CLASSES)):
        rows = (digits.labels == label).nonzero().flatten()
        for position, domain in enumerate(DOMAINS):
            for number, row in enumerate(rows[position * EACH : (position + 1) * EACH].tolist()):
                path = folder / domain / CLASSES[label] / f"{number:03d}.png"
                if domain == "negative" and label == 3:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = digits.pixels[row, 0].numpy()
                Image.fromarray(255 - pixels if domain == "negative" else pixels).save(path)
    return folder


def settings(folder: Path, **changes: Scalar) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {
        "data__name": "image-folder", "data__dir": str(folder), "data__classes": ",".join(CLASSES),
        "data__channels": 1, "data__size": 8, "partition__name": "domains", "partition__domains": ",".join(DOMAINS),
        "partition__labels_per_client": 4, "partition__clients": 6, "partition__unseen_clients": 2,
        "partition__samples_per_client": 24, "moe__experts": 2, "moe__top_k": 1, "cohort__anchors": 2,
        "cohort__normals": 2,
    }  # fmt: skip
    return flat | changes


def config(folder: Path, **changes: Scalar) -> Config:
    flat = settings(folder, **changes)
    return Config.from_flat({key.replace("__", ".").replace("_", "-"): value for key, value in flat.items()})


def test_every_fifth_image_of_a_domain_and_class_is_a_test_image(folder: Path) -> None:
    dataset = open_dataset(config(folder))
    for images, each in ((dataset.train, EACH - EACH // 5), (dataset.test, EACH // 5)):
        assert images.domains is not None
        cells = torch.bincount(images.domains * 4 + images.labels, minlength=8)
        assert cells.tolist() == [each] * 7 + [0]
    bright = [float(dataset.train.pixels[dataset.train.domains == domain].float().mean()) for domain in (0, 1)]
    assert bright[0] < 100 < 150 < bright[1]


@pytest.mark.parametrize("client", range(8))
def test_a_client_holds_images_of_its_domain_alone(folder: Path, client: int) -> None:
    """Anchors hold one domain each, all others follow in turn; the negative one has three classes."""
    of = config(folder)
    held = open_client(of, client)
    domain = client % 2
    assert held.images.domains is not None
    assert held.images.domains.tolist() == [domain] * len(held.images)
    assert held.images.labels.unique().tolist() == list(range(4 - domain))
    assert (float(held.images.pixels.float().mean()) > 125) is bool(domain)
    assert len(held.images) == (24 if client < 6 else 4 * (4 - domain))


def test_an_unseen_client_may_hold_two_domains_and_one_may_be_left_out(folder: Path) -> None:
    mixed = open_client(config(folder, partition__unseen_domains=2, partition__unseen_samples=8), 6)
    assert mixed.images.domains is not None
    assert mixed.images.domains.tolist() == [0] * 4 + [1] * 4
    left_out = config(folder, partition__held_out_domain="negative", moe__experts=1, cohort__anchors=1)
    domains = [open_client(left_out, client).images.domains for client in range(8)]
    assert [int(d.unique()) for d in domains if d is not None] == [0] * 6 + [1] * 2
    assert len(set(np.concatenate(open_split(left_out).samples[:6]).tolist())) <= 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"partition__domains": "print,sketch"}, "sketch: no such folder of images"),
        ({"partition__domains": "print,print/0"}, "a domain's images lie in one folder for each class"),
        ({"data__classes": "0,1"}, "no such class; there are 0, 1"),
    ],
)
def test_folders_that_do_not_fit_are_named(folder: Path, changes: dict[str, Scalar], reason: str) -> None:
    with pytest.raises(FedjetsError, match=reason):
        open_dataset(config(folder, **changes))


def test_a_run_tells_its_tables_by_domain(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = settings(folder, run__rounds=4, run__evaluate_every=4, common_expert__target_accuracy=0.5)
    run = run_in_process(tmp_path, monkeypatch, **own, transport__name="inline", train__lr=0.1, moe__trainable="head")
    assert open_task(run.config).spec.kinds == DOMAINS
    run.let_go()
    summary = open_run(run.config.run_dir).summary
    assert summary["kinds"] == list(DOMAINS)
    assert np.array(summary["expert_class_accuracy"]).shape == (2, 2)


def test_of_public_folders_alone_a_site_and_its_server_tell_the_same_columns(folder: Path) -> None:
    """The site has no folder of domains, and does not say of which its images are."""
    server = config(folder, partition__public_share=1.0)
    site = server.model_copy(update={"data": server.data.model_copy(update={"dir": ""})})
    assert open_task(server).spec.columns == open_task(site).spec.columns == CLASSES


def test_nobody_trains_on_a_domain_that_is_held_out(folder: Path) -> None:
    """Not the common expert, and not the server that judges by public samples."""
    left_out, public = {"partition__held_out_domain": "negative"}, {"partition__public_share": 0.6}
    for of in (config(folder, **left_out), config(folder, **left_out, **public)):
        parts = [*_parts(of), open_public(of)] if of.partition.public_share else _parts(of)
        for part in parts:
            assert part.domains is not None
            assert part.domains.unique().tolist() == [0]
    everything = _parts(config(folder, **public))[0].domains
    assert everything is not None
    assert everything.unique().tolist() == [0, 1]


def test_more_domains_than_samples_are_no_reason_for_more_samples(folder: Path) -> None:
    of = config(folder, partition__unseen_samples=1, partition__unseen_domains=2)
    assert [len(open_client(of, client).images) for client in (6, 7)] == [1, 1]


@pytest.mark.parametrize(("gone", "where"), [("test", "test"), ("test/b", "test"), ("train/a", "train")])
def test_a_class_that_a_folder_lacks_is_named_with_the_folder(tmp_path: Path, gone: str, where: str) -> None:
    for part in ("train", "test"):
        for name in "abcdef":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / part / name / "0.png")
    shutil.rmtree(tmp_path / gone)
    of = Config.from_flat(
        {"data.name": "image-folder", "data.dir": str(tmp_path), "data.classes": "a,b,c,d,e,f", "data.channels": 1,
         "data.size": 8, "moe.experts": 3, "cohort.anchors": 3, "partition.labels-per-client": 2}
    )  # fmt: skip
    with pytest.raises(FedjetsError, match=rf"/{where}: no image of class '[ab]', which the partition deals"):
        open_split(of)
