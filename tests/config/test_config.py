import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.config.docs import app_config, document, pyproject_with_settings
from fedjets_flwr.config.schema import Config, settings
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.config.sources import about_preset, local_config, parse_pairs, preset_names, read_flat, read_preset
from fedjets_flwr.errors import FedjetsError
from strategies import strategy

ROOT = Path(__file__).resolve().parents[2]
PRESETS = preset_names()


def error(**flat: Scalar) -> str:
    with pytest.raises(FedjetsError) as caught:
        Config.from_flat(flat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_valid_and_survive_a_round_trip() -> None:
    config = Config.from_flat({})
    assert config == Config()
    assert Config.from_flat(config.flat()) == config
    assert list(config.flat()) == list(settings())


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "run.seed": st.integers(0, 2**60),
            "train.lr": st.floats(1e-6, 10),
            "moe.top-k": st.integers(1, 5),
            "moe.renormalise": st.booleans(),
            "moe.mix": st.sampled_from(["", "logits", "probs"]),
            "run.name": st.text("abc-01", max_size=8),
            "partition.unseen-samples": st.integers(0, 1000),
        },
    )
)
def test_round_trip(flat: dict[str, Scalar]) -> None:
    config = Config.from_flat(flat)
    assert Config.from_flat(config.flat()) == config
    assert flat.items() <= config.flat().items()


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("moe.topk", "moe.top-k"), ("moe.top_k", "moe.top-k"), ("run.round", "run.rounds"), ("gate.lrs", "gate.lr")],
)
def test_an_unknown_key_gets_the_closest_one(key: str, suggestion: str) -> None:
    assert error(**{key: 1}) == f"{key}: no such setting; did you mean {suggestion}?"


def test_a_hopeless_key_gets_the_list() -> None:
    assert "fedjets settings" in error(**{"qqqqqqqq": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe.top-k", 6),
        ("moe.top-k", 0),
        ("moe.top-k", "many"),
        ("moe.top-k", 1.5),
        ("moe.experts", 0),
        ("moe.renormalise", "perhaps"),
        ("moe.mix", "votes"),
        ("cohort.anchors", 6),
        ("cohort.normals", 16),
        ("partition.clients", 4),
        ("partition.samples-per-client", -1),
        ("partition.alpha", 0.0),
        ("run.rounds", 0),
        ("run.seed", -1),
        ("run.name", 3),
        ("data.name", "mnist"),
        ("train.lr", math.nan),
        ("train.lr", math.inf),
        ("train.lr", 0.0),
        ("train.momentum", 1.0),
        ("limits.max-failure-share", 1.01),
        ("common-expert.target-accuracy", 0.0),
        ("model.name", "resnet9000\nor so"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(key: str, value: Scalar) -> None:
    text = error(**{key: value})
    assert text.startswith(f"{key} = ")
    assert repr(value) in text or str(value) in text


def test_an_empty_cohort_is_refused() -> None:
    assert error(**{"cohort.anchors": 0, "cohort.normals": 0}).startswith("cohort.anchors + cohort.normals = 0")


def test_augmentation_needs_whole_experts() -> None:
    flat: dict[str, Scalar] = {"data.augment": "crop", "moe.trainable": "head"}
    assert error(**flat).startswith("data.augment = 'crop'")
    assert Config.from_flat(flat | {"moe.trainable": "all"}).data.augment == "crop"


def test_what_the_server_judges_by_is_no_validation_clients() -> None:
    judged = {"aggregation.rule": "validated", "partition.public-share": 0.3}
    Config.from_flat(judged)
    with pytest.raises(FedjetsError, match="aggregation.rule = 'validated': .* set partition.validation-clients to 0"):
        Config.from_flat(judged | {"partition.validation-clients": 2})


def test_more_anchors_than_experts_are_refused() -> None:
    config = Config.from_flat({"partition.anchors": 7, "moe.experts": 5})
    with pytest.raises(FedjetsError, match=r"^partition\.anchors = 7"):
        strategy("fedjets").validate(config)
    strategy("fedavg").validate(config)


def test_anchors_follow_the_experts_unless_set() -> None:
    assert Config.from_flat({}).num_anchors == 5
    assert Config.from_flat({"partition.anchors": 3, "cohort.anchors": 3}).num_anchors == 3


def test_settings_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.name", "mine"),
        ("run.output-dir", "/elsewhere"),
        ("run.cache-dir", "/elsewhere"),
        ("data.dir", "/elsewhere"),
        ("data.download", False),
        ("transport.name", "inline"),
        ("limits.exchange-seconds", 5.0),
        ("run.resume", True),
        ("run.rounds", 99),
    ],
)
def test_identity_ignores_what_does_not_change_the_result(key: str, value: Scalar) -> None:
    assert Config.from_flat({key: value}).flat()[key] != Config().flat()[key]
    assert Config.from_flat({key: value}).identity() == Config().identity()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 2),
        ("moe.top-k", 1),
        ("moe.init", "common"),
        ("train.lr", 0.06),
        ("partition.alpha", 0.2),
        ("aggregation.weighting", "equal"),
        ("gate.mode", "random"),
        ("common-expert.target-accuracy", 0.8),
        ("strategy.name", "fedavg"),
    ],
)
def test_identity_sees_what_changes_the_result(key: str, value: Scalar) -> None:
    assert Config.from_flat({key: value}).identity() != Config().identity()


def test_identity_sees_the_rounds_of_a_schedule() -> None:
    """With a cosine the rates of all rounds depend on their number."""
    cosine = [Config.from_flat({"train.schedule": "cosine", "run.rounds": rounds}).identity() for rounds in (40, 80)]
    assert cosine[0] != cosine[1]


def test_run_folder(tmp_path: Path) -> None:
    flat: dict[str, Scalar] = {"run.output-dir": str(tmp_path)}
    found = Config.from_flat(flat)
    assert found.run_dir == tmp_path / f"fedjets-digits-{found.identity()[:8]}"
    assert Config.from_flat(flat | {"run.name": "mine"}).run_dir == tmp_path / "mine"


def test_folders_take_the_setting_then_the_environment_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDJETS_CACHE", "/from/environment")
    monkeypatch.setenv("FEDJETS_DATA", "/data/of/environment")
    assert Config.from_flat({"run.cache-dir": "/set"}).cache_dir == Path("/set")
    assert Config().cache_dir == Path("/from/environment")
    assert Config().data_dir == Path("/data/of/environment")
    monkeypatch.delenv("FEDJETS_CACHE")
    monkeypatch.delenv("FEDJETS_DATA")
    assert Config().cache_dir == Path("~/.cache/fedjets").expanduser()
    assert Config().data_dir == Path("~/.cache/fedjets/data").expanduser()


def test_pyproject_lists_every_setting() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert dict(_dotted(listed)) == Config().flat()
    assert pyproject_with_settings(text) == text


def _dotted(table: dict[str, object], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in table.items():
        pairs += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def test_the_document_of_settings_lists_every_setting() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == document()
    assert all(f"| `{key}` |" in text for key in settings())


def test_every_setting_is_described() -> None:
    assert all(description and allowed for _, allowed, description in settings().values())
    assert app_config().count("\n") == len(Config().flat())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_say_what_they_are(name: str, tmp_path: Path) -> None:
    assert local_config(read_flat(name, None, []), tmp_path).run.output_dir == str(tmp_path)
    assert about_preset(name)


def test_presets_are_found_by_name_alone() -> None:
    assert {"cifar10-laptop", "digits", "fedavg"} <= set(PRESETS)
    assert read_preset("cifar10-laptop")["data.name"] == "cifar10"
    for name in ("cifar10_laptop", "../digits", "", "digits.toml"):
        with pytest.raises(FedjetsError, match="--preset .*choose one of .*digits"):
            read_preset(name)
    with pytest.raises(FedjetsError, match="--preset digits --config mine.toml: give one of them"):
        read_flat("digits", Path("mine.toml"), [])


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["run.rounds=2 strategy.name='fedavg'"], {"run.rounds": 2, "strategy.name": "fedavg"}),
        (['run.rounds=2  strategy.name="fedavg" '], {"run.rounds": 2, "strategy.name": "fedavg"}),
        (["run.rounds=2", "strategy.name=fedavg"], {"run.rounds": 2, "strategy.name": "fedavg"}),
        (["run.rounds=2", "run.rounds=3 train.lr = 1e-3"], {"run.rounds": 3, "train.lr": 1e-3}),
        (["data.classes=cat, dog run.resume=true"], {"data.classes": "cat, dog", "run.resume": True}),
        (["run.name='a b.c=1'"], {"run.name": "a b.c=1"}),
        (['run.name="say \\"hi\\" x.y=2" moe.top-k=1'], {"run.name": 'say "hi" x.y=2', "moe.top-k": 1}),
        (["run.name="], {"run.name": ""}),
        (["run.name= run.rounds=2"], {"run.name": "", "run.rounds": 2}),
        (["data.dir=/a=b/c d"], {"data.dir": "/a=b/c d"}),
        (["run.name=it's"], {"run.name": "it's"}),
    ],
)
def test_both_ways_of_writing_settings(texts: list[str], found: dict[str, Scalar]) -> None:
    assert parse_pairs(texts) == found


@pytest.mark.parametrize("text", ["novalue", "", "  ", "run.rounds 3", "=3"])
def test_what_is_no_setting_is_named(text: str) -> None:
    with pytest.raises(FedjetsError, match="-c .*write it as key=value"):
        parse_pairs([text])


SCALARS = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS |= st.text(st.characters(exclude_categories=("Cc", "Cs")))  # what TOML takes without an escape


@given(st.dictionaries(st.sampled_from(list(Config().flat())), SCALARS, min_size=1))
def test_what_is_written_is_read_in_either_form(written: dict[str, Scalar]) -> None:
    texts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in written.items()]
    assert parse_pairs(texts) == parse_pairs([" ".join(texts)]) == written


def test_pairs_win_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text('run.rounds = 3\n[moe]\ntop-k = 1\nmix = "probs"\n')
    found = local_config(read_flat("", preset, ["moe.top-k=3", "run.name = a b", "train.lr=1e-3"]), tmp_path)
    assert (found.run.rounds, found.moe.top_k, found.moe.mix) == (3, 3, "probs")
    assert (found.run.name, found.train.lr) == ("a b", 1e-3)


@pytest.mark.parametrize("text", ["moe.top-k = ", "\x00", "[moe", "moe.top-k = 1\nmoe.top-k = 2"])
def test_a_broken_preset_names_its_file(tmp_path: Path, text: str) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(text)
    with pytest.raises(FedjetsError, match=f"--config {preset}") as caught:
        local_config(read_flat("", preset, []))
    assert "\n" not in str(caught.value)


NO_NAMES = ["../victim", "a/b", "/etc", "..", ".", ".hidden", "a\\b", "a\0b", "a\nb", "\x1b[31m", "x" * 101, "ü" * 51]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_runs_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(FedjetsError, match=r"^run\.name = ") as caught:
        Config.from_flat({"run.output-dir": str(tmp_path), "run.name": name})
    assert str(caught.value).isprintable()
    with pytest.raises(FedjetsError, match=r"^strategy\.name = "):
        Config.from_flat({"run.output-dir": str(tmp_path), "strategy.name": name})


@pytest.mark.parametrize("name", ["first", "a b", "résumé.v2", "x=1,y=2", "x" * 100, "[bold]"])
def test_plain_names_of_runs_are_taken(tmp_path: Path, name: str) -> None:
    assert Config.from_flat({"run.output-dir": str(tmp_path), "run.name": name}).run_dir == tmp_path / name
