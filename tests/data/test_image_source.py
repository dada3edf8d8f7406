"""Images of any size, kind and state of repair."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from fedjets_flwr.data.datasets import UNKNOWN
from fedjets_flwr.data.image_folder import MAX_BYTES, list_images, read_folder, read_image
from fedjets_flwr.errors import FedjetsError

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
GREY, COLOUR = (1, 8, 8), (3, 8, 8)


def kinds() -> dict[str, Image.Image]:
    """The same 8x8 ramp in every kind of picture."""
    grey = Image.fromarray(RAMP)
    sixteen = Image.fromarray(RAMP.astype(np.uint16) * 257)
    palette = grey.convert("P")
    alpha = grey.convert("RGBA")
    alpha.putalpha(200)
    return {
        "grey.png": grey, "rgb.png": grey.convert("RGB"), "rgba.png": alpha, "la.png": grey.convert("LA"),
        "palette.png": palette, "sixteen.png": sixteen, "sixteen.tiff": sixteen, "rgb.bmp": grey.convert("RGB"),
        "cmyk.tiff": grey.convert("RGB").convert("CMYK"), "lossless.webp": grey.convert("RGB"),
        "integers.tiff": Image.fromarray(RAMP.astype(np.int32) * 257),
    }  # fmt: skip


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_every_kind_of_picture_is_the_same_picture(tmp_path: Path, name: str, shape: tuple[int, int, int]) -> None:
    kinds()[name].save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    found = read_image(tmp_path / name, shape)
    assert found.dtype == np.uint8
    assert found.shape == shape
    assert found.flags["C_CONTIGUOUS"]
    for channel in found:
        assert np.abs(channel.astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (8, 8), (640, 480)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
def test_every_size_is_stretched(tmp_path: Path, size: tuple[int, int], shape: tuple[int, int, int]) -> None:
    Image.new("RGB", size, (200, 200, 200)).save(tmp_path / "plain.png")
    found = read_image(tmp_path / "plain.png", shape)
    assert found.shape == shape
    assert (found == 200).all()


def test_a_photo_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter to the right
    Image.fromarray(RAMP).save(tmp_path / "turned.png", exif=exif)
    assert (read_image(tmp_path / "turned.png", GREY)[0] == np.rot90(RAMP, -1)).all()


def test_classes_come_from_folders_and_hidden_files_do_not_count(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/deep/a.JPG", "cat/z.png", "dog/.hidden.png", "dog/.cache/c.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RAMP).save(tmp_path / name, "PNG")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    paths, labels = list_images(tmp_path, ("bird", "cat", "dog"))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["cat/z.png", "dog/b.png", "dog/deep/a.JPG"]
    assert labels == (1, 2, 2)
    folder = read_folder(tmp_path, ("bird", "cat", "dog"), GREY)
    assert folder.images.labelled
    assert folder.images.pixels.shape == (3, 1, 8, 8)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    folder = read_folder(tmp_path, ("x", "y"), GREY)
    assert folder.images.labels.tolist() == [UNKNOWN]
    assert torch.equal(folder.images.pixels[0, 0], torch.from_numpy(RAMP))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no image in it"),
        (("notes.txt",), "no image in it"),
        (("cow/a.png",), "cow: no such class; there are cat, dog: name folders as the classes"),
        (("cat/a.png", "b.png"), "b.png: lies beside class folders"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(FedjetsError, match=message):
        list_images(tmp_path, ("cat", "dog"))


def test_a_bomb_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FedjetsError, match=r"bomb.png: not a readable image \(.*bomb"):
        read_image(tmp_path / "bomb.png", GREY)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(buffer, kind, exif=exif)
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP")}


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(FILES)),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_a_damaged_image_is_read_or_is_one_line(
    tmp_path: Path, kind: str, cut: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(FILES[kind])
    for where, value in changes:
        data[int(where**3 * len(data))] = value  # mostly in the header
    path = tmp_path / "damaged.png"
    path.write_bytes(data[: round(cut**0.2 * len(data))])
    try:
        assert read_image(path, COLOUR).shape == COLOUR
    except FedjetsError as error:
        assert str(error).startswith(f"{path}: not a readable image (")
        assert "\n" not in str(error)


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\x80\x04cos\nsystem\n", b"<svg/>"])
def test_what_is_no_image_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(FedjetsError, match=r"x.png: not a readable image \(.+\)"):
        read_image(tmp_path / "x.png", COLOUR)


@pytest.mark.parametrize("kind", ["EPS", "GIF", "ICO", "PDF"])
def test_a_format_outside_the_list_is_not_opened_by_whatever_name(tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "x.png", format=kind)
    with pytest.raises(FedjetsError, match=r"x\.png: not a readable image \(cannot identify"):
        read_image(tmp_path / "x.png", GREY)


def claim(path: Path, width: int, height: int) -> None:
    """Write a small PNG whose header claims another size."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (10_000, 5_001)])
def test_pixels_are_counted_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the limit is ours
    claim(tmp_path / "x.png", width, height)
    with pytest.raises(FedjetsError, match=rf"x\.png: not a readable image \({width} x {height} are more than"):
        read_image(tmp_path / "x.png", GREY)


def test_a_file_of_too_many_bytes_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FedjetsError, match=f"more than {MAX_BYTES} bytes"):
        read_image(tmp_path / "x.png", GREY)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    """Nobody knows which number is white; Pillow would cut them off at 255."""
    Image.fromarray(RAMP.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    with pytest.raises(FedjetsError, match=r"float.tiff: not a readable image \(floating-point pixels; save them as"):
        read_image(tmp_path / "float.tiff", (1, *RAMP.shape))


def test_twelve_bits_in_sixteen_are_told_once_for_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cameras and scanners count so; the upper 8 bits of that are nearly black."""
    for name in ("a.png", "b.png"):
        Image.fromarray(RAMP.astype(np.uint16) * 16).save(tmp_path / name)
        assert read_image(tmp_path / name, (1, *RAMP.shape)).max() < 16
    assert caplog.text.count("images of 16 bits that use 12 of them or fewer") == 1
    (tmp_path / "full").mkdir()
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "full" / "c.png")
    read_image(tmp_path / "full" / "c.png", (1, *RAMP.shape))
    assert caplog.text.count("images of 16 bits") == 1
