import pytest
import torch
from torch import Tensor

from fedjets_flwr.config.sections import Data
from fedjets_flwr.data.transforms import AUGMENTATIONS, crop, crop_flip, keep, normalise


def pixels(n: int = 40, size: int = 8, channels: int = 2) -> Tensor:
    """Random images without a zero, so that padding is told from content."""
    shape = (n, channels, size, size)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def shifts(image: Tensor, pad: int) -> dict[tuple[int, int], Tensor]:
    """Every window of the zero-padded image."""
    channels, size, _ = image.shape
    padded = torch.zeros(channels, size + 2 * pad, size + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + size, pad : pad + size] = image
    moves = range(2 * pad + 1)
    return {(top, left): padded[:, top : top + size, left : left + size] for top in moves for left in moves}


def found_shifts(before: Tensor, after: Tensor, pad: int) -> list[tuple[int, int]]:
    """The one shift that explains each image."""
    found = []
    for old, new in zip(before, after, strict=True):
        matches = [move for move, window in shifts(old, pad).items() if torch.equal(window, new)]
        assert len(matches) == 1
        found.append(matches[0])
    return found


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalise_by_hand() -> None:
    """(x / 255 - mean) / std: channel 0 of 255 with mean .5 and std .25 is 2, channel 1 of 51 with .2 and .1 is 0."""
    x = torch.tensor([[[[255]], [[51]]], [[[0]], [[102]]]], dtype=torch.uint8)
    found = normalise(x, (0.5, 0.2), (0.25, 0.1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(1), torch.tensor([[2.0, 0.0], [-2.0, 2.0]]), atol=1e-6, rtol=0)
    assert x.dtype == torch.uint8
    assert x[0, 0, 0, 0] == 255


@pytest.mark.parametrize(("size", "pad"), [(8, 1), (32, 4)])
def test_crop_shifts_every_image_by_its_own_offset(size: int, pad: int) -> None:
    before = pixels(40, size)
    moves = found_shifts(before, crop(before, generator()), pad)
    assert {top for top, _ in moves} == {left for _, left in moves} == set(range(2 * pad + 1))
    assert len(set(moves)) > 2 * pad + 1  # rows and columns are drawn apart


def test_crop_flip_mirrors_about_half() -> None:
    before = pixels(200)
    after = crop_flip(before, generator())
    plain = [any(torch.equal(w, new) for w in shifts(old, 1).values()) for old, new in zip(before, after, strict=True)]
    mirrored = after[~torch.tensor(plain)].flip(3)
    found_shifts(before[~torch.tensor(plain)], mirrored, 1)
    assert 70 < len(mirrored) < 130


@pytest.mark.parametrize("name", ["crop", "crop-flip"])
def test_augmentation_depends_on_its_generator_alone(name: str) -> None:
    before = pixels()
    copy = before.clone()
    first = AUGMENTATIONS[name](before, generator(1))
    torch.rand(3)
    assert torch.equal(AUGMENTATIONS[name](before, generator(1)), first)
    assert not torch.equal(AUGMENTATIONS[name](before, generator(2)), first)
    assert torch.equal(before, copy)
    assert (first.dtype, first.shape) == (before.dtype, before.shape)


def test_keep_is_the_identity() -> None:
    before = pixels()
    assert torch.equal(keep(before, generator()), before)
    assert AUGMENTATIONS["none"] is keep


@pytest.mark.parametrize("name", Data.model_json_schema()["properties"]["augment"]["enum"])
def test_every_setting_has_its_augmentation(name: str) -> None:
    assert AUGMENTATIONS[name](pixels(3), generator()).shape == (3, 2, 8, 8)
