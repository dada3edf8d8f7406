import math
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_dataset
from fedjets_flwr.data.partition import held_out, public_samples
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.common_expert import _load, accuracy_of, load_common_expert
from fedjets_flwr.models.pretraining import cached_path, pretrain, provide_common_expert

TRAINING, WAITING = "training a common expert", "waiting for the common expert"


def test_runs_that_begin_at_once_train_one_common_expert(tmp_path: Path) -> None:
    """The other run begins while one trains, and waits for it."""
    config = Config.from_flat({"run.cache-dir": str(tmp_path), "common-expert.target-accuracy": 0.1})
    said: dict[str, list[str]] = {"first": [], "other": []}
    digests = set[str]()
    trains, waits = threading.Event(), threading.Event()

    def begin(name: str) -> None:
        def hear(text: str) -> None:
            said[name].append(text)
            if TRAINING in text:
                trains.set()
                assert waits.wait(20)
            if WAITING in text:
                waits.set()

        digests.add(provide_common_expert(config, hear).digest)

    first, other = (threading.Thread(target=begin, args=(name,)) for name in said)
    first.start()
    assert trains.wait(20)
    other.start()
    first.join()
    other.join()
    assert len(digests) == 1
    assert not any(TRAINING in text for text in said["other"])
    assert len(list((tmp_path / "common-experts").iterdir())) == 1


def of_folder(folder: Path, shades: dict[str, int], **changes: Scalar) -> Config:
    """Return settings of a folder with an image of a shade for each class, in train and in test."""
    for part in ("train", "test"):
        for name, shade in shades.items():
            (folder / part / name).mkdir(parents=True)
            Image.new("L", (8, 8), shade).save(folder / part / name / "0.png")
    own = {
        "data.name": "image-folder",
        "data.dir": str(folder),
        "data.classes": "a,b",
        "data.channels": 1,
        "data.size": 8,
    }
    return Config.from_flat({**own, "model.name": "cnn", "run.cache-dir": str(folder.parent / "cache")} | changes)


def test_other_images_have_another_common_expert(tmp_path: Path) -> None:
    """Settings do not tell a folder from another; a copy elsewhere is the same, and so is its common expert."""
    one, other = (of_folder(tmp_path / name, {"a": shade, "b": 9}) for name, shade in (("one", 1), ("other", 2)))
    copy = of_folder(tmp_path / "copy", {"a": 1, "b": 9})
    swapped = of_folder(tmp_path / "swapped", {"a": 9, "b": 1})
    assert len({cached_path(one), cached_path(other), cached_path(swapped)}) == 3
    assert cached_path(copy) == cached_path(one)


@pytest.mark.parametrize("epochs", [0, 1])
def test_without_images_nothing_is_trained(tmp_path: Path, epochs: int) -> None:
    config = of_folder(tmp_path / "none", {}, **{"common-expert.max-epochs": epochs})
    with pytest.raises(FedjetsError, match="data.dir = .*no images to train a common expert on.*common-expert.path"):
        pretrain(config, lambda text: None)


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path: Path) -> None:
    config = of_folder(tmp_path / "one", {"a": 1, "b": 9}, **{"common-expert.max-epochs": 0})
    whole = provide_common_expert(config, lambda text: None)
    path = cached_path(config)
    path.write_bytes(path.read_bytes()[:100])
    _load.cache_clear()  # as in a process to come
    assert provide_common_expert(config, lambda text: None).digest == whole.digest
    assert load_common_expert(path).digest == whole.digest


def test_a_common_expert_that_misses_its_target_is_kept_as_it_was_at_its_best(tmp_path: Path) -> None:
    """Hours of training are not lost, and the message says how to go on with what they brought."""
    said: list[str] = []
    flat = {
        "run.cache-dir": str(tmp_path / "cache"),
        "common-expert.target-accuracy": 1.0,
        "partition.public-share": 0.5,
    }
    config = Config.from_flat({**flat, "common-expert.max-epochs": 3, "common-expert.lr": 0.5})
    with pytest.raises(FedjetsError, match=r"target-accuracy = 1\.0: the best of 3 epochs was 0\.\d+;") as raised:
        provide_common_expert(config, said.append)
    path = Path(str(raised.value).rpartition("common-expert.path = ")[2].strip("'"))
    looks = [float(line.rpartition(" ")[2]) for line in said if "held-out accuracy" in line]
    best = load_common_expert(path)
    assert round(best.accuracy, 4) == max(looks)
    train = open_dataset(config).train
    stops = train.subset(held_out(public_samples(config, len(train))))
    assert round(accuracy_of(best, stops.pixels, stops.labels), 4) == max(looks)
    assert not math.isnan(best.usual_entropy)
    named = Config.from_flat({**flat, "common-expert.path": str(path)})
    assert provide_common_expert(named, said.append).digest == best.digest
    assert not cached_path(config).exists()


def test_layers_that_draw_draw_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    config = of_folder(
        tmp_path / "one", {"a": 1, "b": 200}, **{"model.name": "lenet", "data.size": 32, "common-expert.max-epochs": 1,
                                                "common-expert.batch-size": 1, "common-expert.target-accuracy": 0.01}
    )  # fmt: skip
    first = pretrain(config, lambda text: None).digest
    torch.rand(5)
    assert pretrain(config, lambda text: None).digest == first


def test_public_samples_too_few_to_train_on_are_told_by_their_share() -> None:
    config = Config.from_flat({"partition.public-share": 0.003})
    with pytest.raises(FedjetsError, match=r"partition\.public-share = 0\.003: too few images"):
        pretrain(config, lambda text: None)
