"""Whatever lies in the folder of a run, a command that reads it does its work or ends in one clear line."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from fedjets_flwr.runs.checkpoint import checkpoint_files
from tests.support.personal import call, finish

JSON_FILES = ("config.json", "summary.json", "metrics.jsonl")
HOSTILE = (None, True, -1, 10**30, 1e300, "", "x", "\ud800", [], [[1], [1, 2]], {}, {"x": {"x": None}}, [None] * 3)
DEEP = "[" * 5000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory).folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.new("L", (8, 8), 100).save(folder / "one.png")
    return folder


def commands(folder: Path, images: Path) -> list[tuple[object, ...]]:
    bundle = folder.parent / "bundle"
    return [("report", folder), ("personalize", "--run", folder, "--images", images, "--output", bundle)]


def check(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Return the exit codes of the commands, each of which says nothing or one line."""
    codes = []
    for arguments in commands(folder, images):
        shutil.rmtree(folder.parent / "bundle", ignore_errors=True)
        capsys.readouterr()
        codes.append(call(monkeypatch, *arguments))
        text = capsys.readouterr().err
        line = text.startswith("error: ") and text.count("\n") == 1 and len(text) < 2000
        assert line if codes[-1] == 1 else (codes[-1], text) == (0, ""), (arguments, codes, text)
    return codes


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILS: dict[str, Callable[[Path], object]] = {
    "a folder in its place": as_folder,
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "nested lists": lambda path: path.write_text(DEEP),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1]"),
    "a number of 5000 digits": lambda path: path.write_text("9" * 5000),
    "an empty object": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
@pytest.mark.parametrize("name", [*JSON_FILES, "common-expert.safetensors"])
def test_a_spoilt_file_is_one_line(
    name: str, spoil: Callable[[Path], object], folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(folder / name)
    codes = check(folder, images, monkeypatch, capsys)
    assert name == "metrics.jsonl" or codes[1] == 1  # rounds are not read to personalise


CHECKPOINTS: dict[str, Callable[[dict[str, torch.Tensor]], bytes]] = {
    "no safetensors": lambda vectors: b"nothing",
    "no experts": lambda vectors: safetensors.torch.save({"gate": vectors["gate"]}),
    "an expert too few": lambda vectors: safetensors.torch.save({k: v for k, v in vectors.items() if k != "expert.0"}),
    "an expert of no number": lambda vectors: safetensors.torch.save(vectors | {"expert.x": torch.ones(1)}),
    "an expert of another size": lambda vectors: safetensors.torch.save(vectors | {"expert.1": torch.ones(3)}),
    "whole numbers": lambda vectors: safetensors.torch.save({k: v.int() for k, v in vectors.items()}),
    "no gate": lambda vectors: safetensors.torch.save({k: v for k, v in vectors.items() if k != "gate"}),
    "not finite": lambda vectors: safetensors.torch.save({k: v * torch.inf for k, v in vectors.items()}),
}


@pytest.mark.parametrize("forge", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_forged_checkpoint_is_one_line(
    forge: Callable[[dict[str, torch.Tensor]], bytes], folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, path = checkpoint_files(folder / "checkpoints")[0]
    data = forge(safetensors.torch.load(path.read_bytes()))
    path.with_name(f"round-000009-{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    assert check(folder, images, monkeypatch, capsys) == [0, 1]  # a report does without images


def test_a_checkpoint_that_is_a_folder_is_one_line(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "checkpoints" / f"round-000009-{'0' * 64}.safetensors").mkdir()
    assert check(folder, images, monkeypatch, capsys) == [0, 1]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to all that lies in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*path, key)
        yield from places(below, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another one in a place; ``...`` takes the place away."""
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if new is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return value


@given(st.data())
@hypothesis_settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_a_wrong_value_anywhere_is_borne_or_one_line(
    finished: Path, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    path = folder / data.draw(st.sampled_from(JSON_FILES))
    value = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    value = json.loads(path.read_text()) if value is None else value
    if data.draw(st.booleans()):
        (folder / "summary.json").unlink()
    place = data.draw(st.sampled_from(list(places(value))))
    value = changed(value, place, data.draw(st.sampled_from((*HOSTILE, ...))))
    text = "".join(json.dumps(v) + "\n" for v in value) if path.suffix == ".jsonl" else json.dumps(value)
    path.write_text(text)
    check(folder, images, monkeypatch, capsys)
