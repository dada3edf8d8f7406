"""Text as tokens: who holds which, and that nothing is lost or held twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.data import text_sources
from fedjets_flwr.data.text import HELD_OUT, PUBLIC, documents_of, open_text, split_of

Make = Callable[..., Config]
PARTS = ("train", "val", "test")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Settings for a few modules of Python's library and their docstrings, with clients of all roles."""
    library = tmp_path / "library"
    for package in ("json", "email", "logging", "xml", "http", "urllib"):
        for path in (text_sources.library_folder() / package).rglob("*.py"):
            copy = library / path.relative_to(text_sources.library_folder())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(text_sources, "library_folder", lambda: library)

    def made(**given: Scalar) -> Config:
        small: dict[str, Scalar] = {
            "data.name": "text", "text.domains": "code,docstrings", "text.vocabulary": 400, "text.train-tokens": 500,
            "text.val-tokens": 100, "text.test-tokens": 200, "partition.clients": 6, "partition.unseen-clients": 3,
            "partition.validation-clients": 2, "cohort.normals": 1, "data.dir": str(tmp_path / "data"),
            "run.cache-dir": str(tmp_path / "cache"),
        }  # fmt: skip
        return Config.from_flat(small | {key.replace("__", ".").replace("_", "-"): v for key, v in given.items()})

    return made


def test_clients_hold_the_domains_in_turn_and_what_the_settings_say(make: Make) -> None:
    text = open_text(make())
    assert text.domains == ("code", "docstrings")
    assert [text.client(client, "train").domain for client in range(11)] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert [len(text.client(3, part).tokens) for part in PARTS] == [500, 100, 200]
    assert text.client(3, "train").tokens.dtype == text.public.dtype == text.public_held_out.dtype == torch.int64
    assert int(text.public.min()) >= 0 and int(text.public.max()) < text.vocabulary == 400


@pytest.mark.parametrize("tokens", ["bpe", "bytes"])
def test_tokens_stand_for_the_very_bytes_of_the_text(make: Make, tokens: str) -> None:
    config = make(text__tokens=tokens)
    text = open_text(config)
    for client in range(11):
        part = text.client(client, "train")
        assert len(text.decode(part.tokens)) == part.num_bytes
    whole = b"".join(text.decode(stream) for stream in (text.public, text.public_held_out))
    public = [d.text for name in text.domains for d in documents_of(config, name) if split_of(d) in (PUBLIC, HELD_OUT)]
    ended = [text if text.endswith("\n") else text + "\n" for text in public]
    assert len(whole) == sum(len(text.encode()) for text in ended)
    assert all(text.encode() in whole for text in ended)
