import tomllib
from pathlib import Path

import pytest

from fedjets_flwr.config.schema import Config, flatten
from fedjets_flwr.config.sources import parse_pairs, remote_config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.deployment import to_node_config
from fedjets_flwr.launch.superlink import NamedSuperLink, to_toml
from fedjets_flwr.runs.claim import agreed


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n'
        '[superlink.hospital]\naddress = "127.0.0.1:8000"\n'
    )
    return tmp_path


def test_a_connection_of_the_users_configuration(home: Path) -> None:
    superlink = NamedSuperLink("hospital")
    assert superlink.environment["FLWR_HOME"] == str(home)
    assert superlink.environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


@pytest.mark.parametrize(
    ("name", "told"),
    [("clinic", "local, hospital"), ("default", "local, hospital"), ("local", "leave --superlink out")],
)
def test_a_connection_that_is_none(home: Path, name: str, told: str) -> None:
    with pytest.raises(FedjetsError, match=f"--superlink {name}: .*{told}"):
        NamedSuperLink(name)


def test_no_configuration_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "none"))
    with pytest.raises(FedjetsError, match=r"--superlink hospital: .*config.toml"):
        NamedSuperLink("hospital")


def test_paths_of_the_other_machine_stay_and_results_come_here(tmp_path: Path) -> None:
    pairs = ["run.output-dir=/srv/runs", "common-expert.path=~/common.safetensors"]
    elsewhere, here = remote_config(parse_pairs(pairs), tmp_path)
    assert elsewhere.run.output_dir == "/srv/runs"
    assert elsewhere.common_expert.path == "~/common.safetensors"
    assert here.run_dir == tmp_path / elsewhere.run_name


@pytest.mark.parametrize(("name", "own"), [("", "-2"), ("mine", "mine")])
def test_both_machines_have_one_name_for_the_folder(tmp_path: Path, name: str, own: str) -> None:
    """Whatever this one holds already."""
    elsewhere, here = remote_config({"run.name": name, "run.output-dir": "/srv/runs"}, tmp_path)
    (tmp_path / Config().run_name).mkdir()
    (tmp_path / Config().run_name / "summary.json").write_text("{}")
    elsewhere, here = agreed(elsewhere, here)
    assert elsewhere.run.name == here.run.name
    assert here.run.name.endswith(own)
    assert (elsewhere.run_dir.parent, here.run_dir.parent) == (Path("/srv/runs"), tmp_path)


def test_a_path_of_the_other_machine_is_absolute() -> None:
    with pytest.raises(FedjetsError, match=r"common-expert.path = 'common.safetensors': .* absolute"):
        remote_config(parse_pairs(["common-expert.path=common.safetensors"]), None)


def test_settings_and_node_configs_are_toml() -> None:
    values = {"client-id": 3, "data-path": '/da ta/"ü"', "role": "train"}
    pairs = to_node_config(values)
    assert pairs == 'client-id=3 data-path="/da ta/\\"ü\\"" role="train"'
    assert dict(flatten(tomllib.loads(to_toml({"a.b": True, "a.c": 'x"ü', "d": 1.5})))) == {
        "a.b": True, "a.c": 'x"ü', "d": 1.5
    }  # fmt: skip
