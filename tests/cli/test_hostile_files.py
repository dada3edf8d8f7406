"""Whatever lies in a file or a folder, a command ends in one clear line."""

import json
from pathlib import Path

import pytest

from fedjets_flwr.config.schema import Config, settings
from fedjets_flwr.errors import FedjetsError
from tests.support.personal import call

DEEP = 3000
BAD_TOML = {
    "nested lists": b"a = " + b"[" * DEEP,
    "nested names": b".".join([b"a"] * DEEP) + b" = 1",
    "a number of 5000 digits": b"run.rounds = " + b"9" * 5000,
    "a number of 5000 hexadecimal digits": b"run.rounds = 0x" + b"f" * 5000,
    "a NUL in a name": b'run.name = "a\\u0000b"',
    "a NUL in a path": b'data.dir = "/a\\u0000b"',
    "a user that does not exist": b'run.cache-dir = "~no-such-user/cache"',
    "not UTF-8": b"run.name = '\xff\xfe'",
    "a table in place of a number": b"[run.rounds]\na = 1",
    "a list": b"run.rounds = [1]",
    "a date": b"run.rounds = 2020-01-01",
}
BAD_YAML = {
    "nested lists": b"[" * DEEP,
    "nested tables": b"{a: " * DEEP,
    "not UTF-8": b"title: \xff\xfe",
    "an empty number": b"seeds: [!!int '']",
    "no date": b"title: !!timestamp x",
    "a NUL": b'title: t\npreset: "a\\0.toml"\nseeds: [1]\nrows: [{name: a}]',
    "nothing": b"",
    "a list that holds itself": b"&a [*a]",
    "a name that is a list": b"? [a]\n: b",
    "a billion laughs": b"a: &a [x,x]\n"
    + b"".join(b"%c: &%c [*%c,*%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 120)),
}


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """Return the one line with which a command ends."""
    capsys.readouterr()
    assert call(monkeypatch, *arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and len(text) < 1000, text
    return text


@pytest.mark.parametrize("text", BAD_TOML.values(), ids=BAD_TOML)
def test_settings_that_make_no_sense_are_one_line(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.toml").write_bytes(text)
    line = told(capsys, monkeypatch, "partition", "--config", tmp_path / "bad.toml")
    assert "--config" in line or "run." in line or "data.dir" in line


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_an_experiment_that_makes_no_sense_is_one_line(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_bytes(text)
    assert "bad.yaml" in told(capsys, monkeypatch, "compare", tmp_path / "bad.yaml")


def test_no_whole_number_is_beyond_all_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [key for key, (default, *_) in settings().items() if type(default) is int and key != "data.channels"]
    assert {"moe.experts", "partition.clients", "run.rounds", "train.batch-size"} < set(whole)
    for key in whole:
        assert key in told(capsys, monkeypatch, "partition", "-c", f"{key}={10**30}")


@pytest.mark.parametrize("value", [json.loads('"\\ud800"'), "a\0b"])
@pytest.mark.parametrize("key", [key for key, value in Config().flat().items() if isinstance(value, str)])
def test_text_that_no_file_can_hold_is_refused(key: str, value: str) -> None:
    with pytest.raises(FedjetsError, match=key):
        Config.from_flat({key: value})
