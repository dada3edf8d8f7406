import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedjets_flwr.cli.app import cli, main
from fedjets_flwr.config.schema import Config
from fedjets_flwr.launch import simulation as launcher
from tests.support.personal import call

BAD = [
    (["-c", "moe.topk=2"], "moe.topk"),
    (["-c", "moe.top-k=9"], "moe.top-k"),
    (["-c", "cohort.anchors=9"], "cohort.anchors"),
    (["-c", "data.name=foo"], "data.name"),
    (["--config", "missing.toml"], "--config missing.toml"),
    (["--config", "."], "--config ."),
    (["-c", "common-expert.path=/nope"], "common-expert.path"),
    (["-c", "partition.samples-per-client=-1"], "partition.samples-per-client"),
    (["-c", "partition.unseen-clients=5000"], "partition.unseen-clients"),
    (["-c", "aggregation.bn=pooled", "-c", "aggregation.rule=median"], "aggregation.bn"),
    (["-c", "novalue"], "-c novalue"),
    (["-c", "strategy.name=nope"], "strategy.name"),
    (["-c", "train.lr=nan"], "train.lr"),
    (["--cpus-per-client", "100000"], "--cpus-per-client"),
    (["--supernodes", "-1"], "--supernodes"),
    (["-c", "data.name=cifar10", "-c", "data.download=false", "-c", "data.dir=empty"], "data.dir"),
    (["--ray-address", "nowhere"], "--ray-address nowhere"),
    (["--ray-address", ""], "--ray-address : give HOST:PORT"),
    (["--ray-address", "auto", "--superlink", "far"], "--ray-address is for a simulation"),
    (["--supernodes", "2", "--superlink", "far"], "--supernodes is for a simulation"),
    (["--gpus", "0", "--superlink", "far"], "--gpus is for a simulation"),
    (["--cpus-per-client", "2", "--superlink", "far"], "--cpus-per-client is for a simulation"),
    (
        ["-c", "aggregation.rule=validated", "-c", "partition.name=domains", "-c", "partition.public-share=0.2"],
        "aggregation.rule",
    ),
    (["-c", "strategy.name=fedmix", "-c", "aggregation.weighting=equal"], "aggregation.weighting"),
    (["-c", "strategy.name=fedsr", "-c", "fedsr.stochastic=false", "-c", "moe.trainable=head"], "moe.trainable"),
]


def fedjets(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def check_error(code: object, stderr: str, name: str) -> None:
    assert code == 1
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"error: {name}")


@pytest.mark.parametrize(("arguments", "name"), BAD, ids=[name for _, name in BAD])
def test_a_bad_setting_is_one_line(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since importing torch anew for every case would take most of the time."""

    def never(self: launcher.LocalFlower) -> launcher.LocalFlower:
        raise AssertionError("Flower was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher.LocalFlower, "__enter__", never)
    monkeypatch.setattr(sys, "argv", ["fedjets", "run", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    check_error(caught.value.code, capsys.readouterr().err, name)
    assert list(tmp_path.iterdir()) == []  # a run that cannot start leaves nothing behind


@pytest.mark.parametrize("index", [1, 6])
def test_a_bad_setting_ends_the_command(index: int, tmp_path: Path) -> None:
    arguments, name = BAD[index]
    done = fedjets("run", *arguments, folder=tmp_path)
    check_error(done.returncode, done.stderr, name)
    assert done.stdout == ""


def test_runs_at_once_are_for_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(monkeypatch, "compare", tmp_path / "any.yaml", "--parallel", "2", "--ray-address", "auto")
    check_error(code, capsys.readouterr().err, "--parallel")


def test_partition_draws_and_prints(tmp_path: Path) -> None:
    done = fedjets("partition", "-c", "data.name=digits", "--output", "pictures/split.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    picture = (tmp_path / "pictures" / "split.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    rows = [line for line in done.stdout.splitlines() if any(role in line for role in ("anchor", "normal", "unseen"))]
    assert len(rows) == 25
    assert sum("anchor" in row for row in rows) == 5
    assert sum("unseen" in row for row in rows) == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("partition", "-c", "data.name=digits", "--output", "split.txt"), "--output split.txt: "),
        (
            ("partition", "-c", "data.name='image-folder' data.classes='a,b,c,d,e'"
             " partition.name='domains' partition.domains='as-is,negative,noise,blur,rotate-90'"),
            "data.dir = '': no images there to deal",
        ),
        (("pretrain", "-c", "data.name=digits", "--output", "empty"), "--output empty: a folder"),
    ],
    ids=["no picture's ending", "no images", "a folder"],
)  # fmt: skip
def test_what_cannot_be_read_or_written_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["fedjets", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    check_error(caught.value.code, capsys.readouterr().err, said)


def test_a_name_that_is_no_text_is_printed_all_the_same(tmp_path: Path) -> None:
    name = os.fsdecode(b"l\xe4ufe.png")
    done = fedjets("partition", "-c", "data.name=digits", "--output", name, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("l\\udce4ufe.png\n")
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize("validation", [0, 2])
def test_the_picture_of_a_partition_names_the_roles_that_there_are(
    validation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    from fedjets_flwr.cli.partition_view import draw, roles_of

    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # keeps the figure to look at
    roles = roles_of(Config.from_flat({"partition.validation-clients": validation, "partition.public-share": 0.2}))
    assert roles == ["anchor"] * 5 + ["normal"] * 15 + ["unseen"] * 5 + ["validation"] * validation
    draw(np.ones((len(roles), 3)), roles, tmp_path / "split.png")
    axes = pyplot.gcf().axes[0]
    named = ["anchor", "normal", "unseen"] + ["validation"] * bool(validation)
    assert axes.get_xlabel() == f"client ({' | '.join(named)})"
    ends = [float(line.get_xdata()[0]) for line in axes.lines]
    assert ends == [5, 20] + [25] * bool(validation)


def test_keys_of_validation_clients_have_their_role_in_the_roster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ("--sites", "5", "--unseen", "1", "--validation", "2")
    assert call(monkeypatch, "credentials", "--output", tmp_path / "keys", *counts) == 0
    roster = (tmp_path / "keys" / "roster").read_text().splitlines()
    assert [line.split()[1] for line in roster] == ["train", "train", "unseen", "validation", "validation"]
    assert call(monkeypatch, "credentials", "--output", tmp_path / "more", "--sites", "2", *counts[2:]) == 1
    assert "--validation 2: more than --sites 2" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_settings_lists_every_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fedjets", "settings"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    shown = capsys.readouterr().out.replace("\n", "")
    assert all(key.split(".")[0] in shown for key in Config().flat())


def test_the_cache_is_listed_by_kind_and_cleared_without_what_is_no_cache(tmp_path: Path) -> None:
    for name in ("embeddings/a", "vectors/client-1/b", "local-privacy/c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x" * 2_000_000)
    where = ["cache", "-c", f"run.cache-dir={tmp_path}"]
    listed = CliRunner().invoke(cli, where).stdout
    assert [line.split("│")[2].strip() for line in listed.splitlines() if "embeddings" in line][0] == "1"
    assert CliRunner().invoke(cli, [*where, "--clear", "nothing"]).exit_code != 0
    assert CliRunner().invoke(cli, [*where, "--clear", "vectors"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "c"]
    assert CliRunner().invoke(cli, [*where, "--clear", "all"]).exit_code == 0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["c"]
