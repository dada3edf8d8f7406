"""What a client keeps: read by the round that comes next, whatever was cut off in between."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client_app.state import ADAPTED, TRAINED, ClientState
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.private_folder import leave_mark, new_start, private_folder, read_mark


def config_of(folder: Path, **changes: Scalar) -> Config:
    own: dict[str, Scalar] = {"run.cache-dir": str(folder), "run.output-dir": str(folder / "runs")}
    return Config.from_flat(own | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})


START = f"{'a' * 32}/{'b' * 32}"


def write(config: Config, when: tuple[int, int], value: float, client: int = 3, start: str = START) -> None:
    ClientState(config, start, client, when).write({"it": torch.tensor([value])})


def read(config: Config, when: tuple[int, int], client: int = 3, start: str = START) -> float | None:
    found = ClientState(config, start, client, when).tensors
    return float(found["it"]) if found else None


def test_a_stage_reads_the_newest_before_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert read(config, (1, TRAINED)) is None
    write(config, (2, TRAINED), 2.0)
    write(config, (2, ADAPTED), 2.5)
    write(config, (5, TRAINED), 5.0)
    found = [read(config, when) for when in ((2, TRAINED), (2, ADAPTED), (3, TRAINED), (5, TRAINED), (5, ADAPTED))]
    assert found == [None, 2.0, 2.5, 2.5, 5.0]
    assert read(config, (9, TRAINED), client=4) is None


def test_what_a_run_that_was_cut_off_wrote_later_goes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for number in (2, 5, 7):
        write(config, (number, TRAINED), float(number))
    assert read(config, (4, TRAINED)) == 2.0
    write(config, (4, TRAINED), 4.0)
    assert read(config, (9, TRAINED)) == 4.0


def test_a_run_that_starts_afresh_sees_nothing_of_the_one_before(tmp_path: Path) -> None:
    config, other = config_of(tmp_path), f"{'a' * 32}/{'c' * 32}"
    write(config, (2, TRAINED), 2.0)
    assert read(config, (5, TRAINED), start=other) is None
    write(config, (3, TRAINED), 3.0, start=other)
    assert read(config, (5, TRAINED), start=other) == 3.0
    assert read(config, (5, TRAINED)) is None
    assert len(list((private_folder(config, "a" * 32) / "client-3").iterdir())) == 1


@given(rounds=st.sets(st.integers(1, 40), min_size=1), every=st.integers(1, 9), keep=st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_every_checkpoint_that_the_server_keeps_finds_its_state(
    tmp_path: Path, rounds: set[int], every: int, keep: int
) -> None:
    config = config_of(tmp_path, run__checkpoint_every=every, run__keep_checkpoints=keep)
    start, done = new_start(config), []
    for number in sorted(rounds):
        kept = [c for c in range(0, number, every) if c][-keep:]
        for checkpoint in kept:  # as they are while this round is done, or cut off
            wanted = max((r for r in done if r <= checkpoint), default=None)
            assert read(config, (checkpoint + 1, TRAINED), start=start) == wanted
        write(config, (number, TRAINED), float(number), start=start)
        done.append(number)
        for checkpoint in kept:
            wanted = max((r for r in done if r <= checkpoint), default=None)
            assert read(config, (checkpoint + 1, TRAINED), start=start) == wanted
    files = list((private_folder(config, start.split("/")[0]) / "client-3").rglob("*.safetensors"))
    assert len(files) <= every * keep + 2


@pytest.mark.parametrize("start", ["", "../../etc", f"{'a' * 32}/../x", "a/b", START + "/c"])
def test_a_malformed_start_is_refused(tmp_path: Path, start: str) -> None:
    with pytest.raises(FedjetsError, match="malformed"):
        ClientState(config_of(tmp_path), start, 1, (1, TRAINED))
    assert not read_mark(config_of(tmp_path), start)


def test_only_the_user_reads_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    leave_mark(config, START)
    write(config, (1, TRAINED), 1.0)
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0
    assert read_mark(config, START)
    assert not read_mark(config, f"{'a' * 32}/{'c' * 32}")


def test_runs_of_the_same_settings_in_two_folders_have_states_of_their_own(tmp_path: Path) -> None:
    one, two = new_start(config_of(tmp_path)), new_start(config_of(tmp_path, run__output_dir=str(tmp_path / "other")))
    assert one.split("/")[0] != two.split("/")[0]
    assert new_start(config_of(tmp_path)).split("/")[0] == one.split("/")[0]
    assert new_start(config_of(tmp_path)) != one
