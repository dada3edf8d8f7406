"""Settings that name files: a run works in a folder of its own, and must find them from there."""

from pathlib import Path

import pytest

from fedjets_flwr.config.sources import PATHS, absolute_paths


@pytest.mark.parametrize("key", PATHS)
def test_a_file_is_named_from_the_folder_of_the_caller(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_paths({key: "there/it-lies", "run.name": "mine"}) == {
        key: str(tmp_path / "there" / "it-lies"), "run.name": "mine",
    }  # fmt: skip
    assert absolute_paths({key: ""}) == {key: ""}
