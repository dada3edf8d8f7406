import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedjets_flwr.data.datasets import Images, _digits_table, load_dataset
from fedjets_flwr.errors import FedjetsError

FILES = {
    "cifar10": ["cifar-10-batches-py/batches.meta", "cifar-10-batches-py/test_batch"]
    + [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
    "cifar100": [f"cifar-100-python/{name}" for name in ("train", "test", "meta")],
}


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.marker, "unpickled")


def test_digits_shapes(tmp_path: Path) -> None:
    digits = load_dataset("digits", tmp_path, False)
    assert digits.shape == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    assert (len(digits.train), len(digits.test)) == (1348, 449)
    for split in (digits.train, digits.test):
        assert split.pixels.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.pixels.shape[1:] == (1, 8, 8)
        assert set(split.labels.tolist()) == set(range(10))
    assert list(tmp_path.iterdir()) == []


def test_digits_are_the_same_without_their_file(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _digits_table()
    monkeypatch.setattr("fedjets_flwr.data.datasets.find_spec", lambda name: None)
    assert np.array_equal(table, _digits_table())


def test_digits_are_split_into_every_fourth_and_the_rest(tmp_path: Path) -> None:
    """Each of scikit-learn's 1797 images is in exactly one split; their 0..16 becomes 0..255."""
    digits, bunch = load_dataset("digits", tmp_path, False), load_digits()
    test = np.arange(1797) % 4 == 3
    for split, rows in ((digits.train, ~test), (digits.test, test)):
        wanted = bunch.images[rows] * 255 / 16
        assert np.abs(split.pixels[:, 0].numpy() - wanted).max() <= 0.5
        assert split.labels.tolist() == bunch.target[rows].tolist()
    train_rows = {image.numpy().tobytes() for image in digits.train.pixels}
    assert not train_rows & {image.numpy().tobytes() for image in digits.test.pixels}


def test_digits_are_normalised_by_their_own_moments(tmp_path: Path) -> None:
    digits = load_dataset("digits", tmp_path, False)
    values = digits.train.pixels.float() / 255
    assert digits.mean[0] == pytest.approx(float(values.mean()), abs=2e-3)
    assert digits.std[0] == pytest.approx(float(values.std()), abs=2e-3)


def test_subset_keeps_order_and_repeats() -> None:
    images = Images(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([5, 6, 7, 8]))
    found = images.subset(np.array([2, 0, 2]))
    assert found.labels.tolist() == [7, 5, 7]
    assert found.pixels.flatten().tolist() == [2, 0, 2]
    assert len(found) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_missing_data_set_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(FedjetsError) as caught:
        load_dataset(name, tmp_path, False)
    text = str(caught.value)
    assert text.startswith("data.dir = ")
    assert str(tmp_path) in text
    assert "digits" in text
    assert "\n" not in text


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_the_published_one_is_never_unpickled(tmp_path: Path, name: str, download: bool) -> None:
    marker, data = tmp_path / "marker", tmp_path / "data"
    payload = pickle.dumps({"data": Bomb(marker)})
    pickle.loads(payload)  # noqa: S301  the payload does work
    assert marker.exists()
    marker.unlink()
    for file in FILES[name]:
        path = data / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)
    with pytest.raises(FedjetsError, match="MD5") as caught:
        load_dataset(name, data, download)
    assert str(caught.value).startswith("data.dir = ")
    assert not marker.exists()
