"""Comparisons: each shipped experiment is sound; a small one runs, goes on where it was cut off, and runs once."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedjets_flwr.cli.app import console
from fedjets_flwr.compare import figures
from fedjets_flwr.compare.experiment import Experiment, Gain, Row, done, read_experiment
from fedjets_flwr.compare.lines import chosen_reading, lines_of
from fedjets_flwr.compare.running import run_experiment
from fedjets_flwr.compare.table import draw_results, markdown, write_results
from fedjets_flwr.config.schema import Config
from fedjets_flwr.cpus import cpu_count
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.follow import check
from fedjets_flwr.runs.checkpoint import Checkpoints, RunLock
from fedjets_flwr.runs.tracking import read_metrics
from server_app.app import run
from strategies import validate
from tests.support.in_process import InProcessGrid, configure
from tests.support.started import TINY
from tests.support.text import TextRun, text_folder, text_run, text_settings

__all__ = ["text_folder", "text_run", "text_settings"]

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))

SMALL = """
title: small
preset: digits
seeds: [1]
rows:
  - {name: FedAvg, settings: {strategy.name: fedavg}}
  - {name: FedJETs, readings: [blend/em]}
"""


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_is_sound(path: Path) -> None:
    experiment = read_experiment(path, [], None)
    assert experiment.title
    assert all(configs for _, configs in experiment.rows)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("title: [", "experiment.yaml"),
        (SMALL.replace("seeds: [1]", "seeds: []"), "seeds"),
        (SMALL.replace("seeds: [1]", "seeds: [1, 2, 1]"), "seeds: one stands there twice"),
        (SMALL.replace("name: FedAvg", "name: FedAvg, seeds: [3, 3]"), "seeds: one stands there twice"),
        (SMALL + "by-seed: {common-expert.seed: [1, 2]}", "by-seed: common-expert.seed: 2 value.s. for 1 seed"),
        (SMALL + "by-seed: {common-expert.sed: [1]}", "row 'FedAvg': .*common-expert.sed"),
        (SMALL.replace("name: FedJETs", "name: FedAvg"), "rows: two are called 'FedAvg'"),
        (SMALL + "by-seed: {moe.top-k: [1]}", "by-seed: moe.top-k: expected a setting of the common expert"),
        (
            SMALL + "settings: {common-expert.seed: 1}\nby-seed: {common-expert.seed: [1]}",
            "by-seed: common-expert.seed: settings has it",
        ),
        (
            SMALL.replace("name: FedAvg", "name: FedAvg, seeds: [1, 3]") + "by-seed: {common-expert.seed: [1]}",
            "by-seed: no value for seed 3 of row 'FedAvg'",
        ),
        (SMALL.replace("strategy.name: fedavg", "strategy.nme: fedavg"), "row 'FedAvg'"),
        (SMALL.replace("preset: digits", "preset: configs/nope.toml"), "nope.toml"),
        (SMALL.replace("readings:", "reading:"), "rows"),
        (SMALL.replace("blend/em", "familiar/em"), "readings: familiar needs personalize.read-out"),
        (SMALL.replace("blend/em", "blend/magic"), "blend/magic"),
        (
            SMALL.replace("name: FedAvg", "name: FedAvg, start: FedJETs"),
            "start: no row 'FedJETs' of seed 1",
        ),
    ],
)
def test_a_wrong_experiment_is_one_clear_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.toml").write_text("")
    path = tmp_path / "experiments" / "experiment.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(FedjetsError, match=word) as caught:
        read_experiment(path, [], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("run.seed", "1"), ("run.output-dir", "elsewhere")])
def test_what_differs_by_run_is_no_setting_of_the_command(tmp_path: Path, key: str, value: str) -> None:
    """With one seed each row would have one run, and count it once for every seed of the file."""
    path = tmp_path / "experiment.yaml"
    path.write_text(SMALL.replace("seeds: [1]", "seeds: [1, 2]"))
    with pytest.raises(FedjetsError, match=f"{key}: all rows would have the same; "):
        read_experiment(path, [f"{key}={value}"], None)


def test_rows_that_start_from_runs_elsewhere_are_runs_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    row = "  - {{name: {0}, settings: {{run.start-from: /runs/{0}/base}}}}\n"
    path.write_text("title: small\npreset: digits\nseeds: [1]\nrows:\n" + row.format("a") + row.format("b"))
    assert len({config.run_name for _, (config,) in read_experiment(path, [], None).rows}) == 2


def test_settings_by_seed_follow_the_seeds_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yaml"
    text = SMALL.replace("seeds: [1]", "seeds: [4, 5]\nby-seed: {common-expert.seed: [7, 8]}")
    text += "  - {name: one, seeds: [5]}\n  - {name: its own, settings: {common-expert.seed: 3, run.seed: 9}}\n"
    path.write_text(text)
    found = {
        row.name: [(c.run.seed, c.common_expert.seed) for c in configs]
        for row, configs in read_experiment(path, [], None).rows
    }
    assert found["FedJETs"] == [(4, 7), (5, 8)]
    assert found["one"] == [(5, 8)]
    assert found["its own"] == [(4, 3), (5, 3)]  # a row's own word counts more, but for the seed


def test_rows_of_other_folders_are_other_runs_and_a_published_data_set_is_the_same_anywhere(tmp_path: Path) -> None:
    def names(**data: str) -> list[str]:
        path = tmp_path / "experiment.yaml"
        told = ", ".join(f"data.{key}: {value}" for key, value in data.items())
        rows = "".join(f"  - {{name: {d}, settings: {{data.dir: {tmp_path / d}, {told}}}}}\n" for d in ("a", "b"))
        path.write_text("title: small\npreset: digits\nseeds: [1]\nrows:\n" + rows)
        return [config.run_name for _, (config,) in read_experiment(path, [], None).rows]

    assert len(set(names(name="cifar10"))) == 1
    assert len(set(names(name="image-folder", classes="'p,q,r,s,t,u,v,w,x,y'"))) == 2


def compare(folder: Path, *arguments: str) -> str:
    pairs = [*TINY, f"run.cache-dir={folder / 'cache'}"]
    options = [part for pair in pairs for part in ("-c", pair)]
    command = [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", "compare"]
    done = subprocess.run(
        [*command, str(folder / "experiments" / "small.yaml"), *options, *arguments], cwd=folder, capture_output=True,
        text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def small(folder: Path, text: str = SMALL) -> Path:
    path = folder / "experiments" / "small.yaml"
    path.parent.mkdir()
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_comparison_runs_each_row_once(tmp_path: Path) -> None:
    small(tmp_path)
    assert compare(tmp_path).count("round 2/2") == 2
    results = tmp_path / "results" / "small"
    table = (results / "table.md").read_text()
    for row in ("| common expert |", "| common expert + EM |", "| FedAvg |", "| FedJETs |", "blend/em"):
        assert row in table
    assert {path.name for path in results.glob("*.png")} == {"accuracy.png", "bytes.png"}
    assert "round" not in compare(tmp_path).split("|")[0]
    assert (results / "table.md").read_text() == table


FOUR = """
title: small
preset: digits
seeds: [1, 2]
rows:
  - {name: FedJETs}
  - {name: "FedJETs, on", start: FedJETs, settings: {train.lr: 0.02}}
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu_count() < 2, reason="a client's process for each of two runs needs a CPU")
def test_runs_at_once_are_those_of_their_own(tmp_path: Path) -> None:
    """Two rows need one common expert that nobody has trained yet, and two start from them."""
    small(tmp_path, FOUR)
    hashes = []
    for parallel in ("2", "1"):
        printed = compare(tmp_path, "--parallel", parallel, "--output-dir", parallel)
        assert printed.count("training a common expert") <= (parallel == "2")  # a look may miss it
        found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob(f"{parallel}/*/summary.json")}
        hashes.append({name: summary["weights_hash"] for name, summary in found.items()})
        assert all(f"{name}: round 2/2" in printed for name in found) == (parallel == "2")
    assert len(set(hashes[0].values())) == 4
    assert hashes[0] == hashes[1]


def test_a_failed_run_is_named_in_the_table(tmp_path: Path) -> None:
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")
    _, (config,) = experiment.rows[0]
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "error.json").write_text('{"reason": "round 3: 6 of 10 clients failed"}')
    table = markdown(experiment)
    assert "| FedAvg | 1 | failed |" in table
    assert "FedAvg: round 3: 6 of 10 clients failed" in table
    assert "| FedJETs |" not in table


def test_every_row_is_checked_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the second row are sound one by one; what is wrong shows in its data."""
    text = SMALL.replace("readings:", "settings: {partition.unseen-clients: 5000}, readings:")
    experiment = read_experiment(small(tmp_path, text), [], tmp_path / "runs")
    with pytest.raises(FedjetsError, match="row 'FedJETs': partition.unseen-clients"):
        run_experiment(
            experiment, tmp_path / "results", lambda *_: pytest.fail("a run was started"), Console(), validate
        )
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "results").exists()


def test_a_run_that_dies_before_it_can_say_why_is_failed_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")

    def die(*_: object) -> None:
        raise FedjetsError("Flower's SuperLink did not start")

    with pytest.raises(FedjetsError, match="2 of 2 runs failed"):
        run_experiment(experiment, tmp_path / "results", die, Console(), validate)
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| FedAvg | 1 | failed |" in table
    assert "FedJETs: Flower's SuperLink did not start" in table


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_row_fails_with_the_one_that_it_starts_from(tmp_path: Path, at_once: int) -> None:
    """For its own reason: there is nothing to start from. Lines of runs at once begin with their names."""
    text = SMALL + "  - {name: after, start: FedAvg}\n"
    experiment = read_experiment(small(tmp_path, text), [], tmp_path / "runs")
    (_, (first,)), *_ = experiment.rows

    def breaks(config: Config, display: Display) -> None:
        check(config)
        raise FedjetsError("broke")

    told = io.StringIO()
    with pytest.raises(FedjetsError, match="3 of 3 runs failed"):
        run_experiment(experiment, tmp_path / "results", breaks, Console(file=told), validate, at_once)
    table = (tmp_path / "results" / "table.md").read_text()
    assert "FedAvg: broke" in table
    assert "FedJETs: broke" in table
    assert "after: run.start-from" in table
    begins = {1: "", 2: f"{first.run_name}: "}[at_once]
    assert f"{begins}run 1 of 3\n" in told.getvalue().splitlines(keepends=True)
    assert f"{begins}failed: broke\n" in told.getvalue().splitlines(keepends=True)
    assert "run 3 of 3, about 0 minutes left\n" in told.getvalue()


@pytest.mark.parametrize(("unseen", "shown"), [((3,), [1, 2]), ((1, 2, 3), [1, 2, 3])])
def test_experts_are_followed_on_the_same_clients(unseen: tuple[int, ...], shown: list[int]) -> None:
    """The validation clients until the last round, which looks with the unseen ones' samples; or these all along."""
    told = {"inspection": {"expert_class_accuracy": [[0.9, 0.1], [0.2, 0.8]]}}
    records = [{"round": r, **told, **({"evaluation": {}} if r in unseen else {"validation": {}})} for r in (1, 2, 3)]
    figure = figures._experts("title", {"row": [({}, records)]})
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [shown, shown]


@pytest.mark.parametrize("name", ["summary.json", "error.json"])
def test_a_damaged_result_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")
    run_dir = experiment.rows[0][1][0].run_dir
    run_dir.mkdir(parents=True)
    (run_dir / name).write_text("")
    with pytest.raises(FedjetsError, match=f"{run_dir.name}/{name}: ") as caught:
        write_results(experiment, tmp_path / "results")
    assert "\n" not in str(caught.value)


def test_a_folder_where_another_run_writes_is_left_alone(tmp_path: Path) -> None:
    """A reason in it would have its Ctrl-C lose a round, and others call it failed."""
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")
    config = experiment.rows[0][1][0]
    config.run_dir.mkdir(parents=True)

    def refused(config: Config, display: Display) -> None:
        raise FedjetsError("another run writes there")

    with RunLock(config), pytest.raises(FedjetsError, match="runs failed"):
        run_experiment(experiment, tmp_path / "results", refused, Console(quiet=True), validate)
    assert not (config.run_dir / "error.json").exists()
    assert (experiment.rows[1][1][0].run_dir / "error.json").is_file()


PERSONAL = """
title: "own tests"
preset: digits
seeds: [1]
settings: {
  run.rounds: 1, partition.val-share: 0.2, partition.test-share: 0.2, adapt.max-epochs: 2, moe.trainable: head,
  moe.init: common, common-expert.target-accuracy: 0.1, partition.clients: 8, cohort.normals: 2,
  participants.clients: 3,
}
rows:
  - {name: "alone", settings: {strategy.name: local}}
  - {name: "FedAvg", settings: {strategy.name: fedavg}}
  - {name: "mixtures", settings: {strategy.name: specialist}}
"""


def in_this_process(config: Config, *_: object) -> None:
    checkpoints = Checkpoints(config)
    run(InProcessGrid(config), config, checkpoints)
    checkpoints.close()


SCORED = """
title: "the same models, other clients"
preset: digits
seeds: [1, 2]
settings: {
  moe.trainable: head, moe.init: common, common-expert.target-accuracy: 0.1, partition.clients: 8, cohort.normals: 2,
}
rows:
  - {name: "FedJETs"}
  - {name: "FedJETs, 30 images", start: FedJETs, settings: {run.rounds: 0, partition.unseen-samples: 30}}
  - {name: "FedJETs, on", start: FedJETs, seeds: [2]}
"""


def test_a_row_starts_from_the_models_of_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same seed; ``-c run.rounds`` is for rows that have some. The table holds all three."""
    configure(tmp_path, monkeypatch)
    extra = [f"run.cache-dir={tmp_path / 'cache'}", "run.rounds=1"]
    experiment = read_experiment(small(tmp_path, SCORED), extra, tmp_path / "runs")
    (_, trained), (_, scored), (_, on) = experiment.rows
    assert [c.run.rounds for c in (*trained, *scored, *on)] == [1, 1, 0, 0, 1]
    assert [c.run.start_from for c in (*scored, *on)] == [str(c.run_dir) for c in (*trained, trained[1])]
    assert len({c.run_dir for c in (*trained, *scored, *on)}) == 5
    run_experiment(experiment, tmp_path / "results", in_this_process, Console(quiet=True), validate)
    hashes = [summary["weights_hash"] for c in (*trained, *scored, *on) if (summary := done(c.run_dir))]
    assert hashes[:2] == hashes[2:4]
    assert hashes[4] not in hashes[:4]
    table = (tmp_path / "results" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in ("FedJETs", "FedJETs, 30 images", "FedJETs, on"))
    held = {line.name: line for line in lines_of(experiment) if line.name.endswith(": common expert + EM")}
    # The third row has the controls of the first.
    assert list(held) == ["FedJETs: common expert + EM", "FedJETs, 30 images: common expert + EM"]
    for name, line in held.items():
        (configs,) = (cs for row, cs in experiment.rows if name.startswith(f"{row.name}: "))
        assert line.last == [summary["controls"]["common_expert_em"] for c in configs if (summary := done(c.run_dir))]
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {"accuracy.png", "bytes.png"}
    elsewhere = read_experiment(tmp_path / "experiments" / "small.yaml", extra, tmp_path / "other")
    assert [c.run.name for _, cs in elsewhere.rows for c in cs] == [c.run.name for _, cs in experiment.rows for c in cs]


def test_runs_that_other_code_did_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in the table as they are, though a method that was edited since may have another outcome."""
    configure(tmp_path, monkeypatch)
    text = SCORED.replace("seeds: [1, 2]", "seeds: [1]").replace("seeds: [2]", "seeds: [1]")
    experiment = read_experiment(small(tmp_path, text), [f"run.cache-dir={tmp_path / 'cache'}"], tmp_path / "runs")

    def told() -> str:
        found = io.StringIO()
        run_experiment(experiment, tmp_path / "results", in_this_process, Console(file=found, width=400), validate)
        return found.getvalue()

    assert "by other code" not in told()
    assert "by other code" not in told()
    (_, (first,)), *_ = experiment.rows
    path = first.run_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "0123456789ab"}))
    said = told()
    assert "1 of 3 runs are done, by other code of this app, and stand in the table as they are" in said
    assert f"{first.run_name} in {tmp_path / 'runs'}" in said


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_controls_that_adapt_batch_norm_are_lines_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    configure(tmp_path, monkeypatch)
    extra = [f"run.cache-dir={tmp_path / 'cache'}", "run.rounds=1", f"model.norm={norm}"]
    experiment = read_experiment(small(tmp_path, SCORED), extra, tmp_path / "runs")
    experiment = replace(experiment, rows=experiment.rows[:1])
    run_experiment(experiment, tmp_path / "results", in_this_process, Console(quiet=True), validate)
    names = {line.name for line in lines_of(experiment)}
    assert {"common expert", "common expert + EM", "common expert + classes known (bound)"} <= names
    assert any("AdaBN" in name for name in names) == (norm == "batch")


VALIDATED = """
title: small
preset: digits
seeds: [1, 2]
settings: {partition.public-share: 0.3, partition.validation-clients: 2, partition.unseen-samples: 40, run.rounds: 2}
rows:
  - {name: FedAvg, settings: {strategy.name: fedavg}}
  - {name: FedJETs, readings: [mixture/none, blend/em]}
"""


def test_the_validation_clients_choose_among_a_rows_read_outs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tmp_path, monkeypatch)
    extra = [f"run.cache-dir={tmp_path / 'cache'}"]
    experiment = read_experiment(small(tmp_path, VALIDATED), extra, tmp_path / "runs")
    run_experiment(experiment, tmp_path / "results", in_this_process, Console(quiet=True), validate)
    summaries = [summary for c in experiment.rows[1][1] if (summary := done(c.run_dir))]
    shown = ("top-1/none", "mixture/none", "blend/em")
    means = {name: sum(s["validation"]["readings"][name] for s in summaries) / 2 for name in shown}
    best = max(shown, key=means.__getitem__)
    table = (tmp_path / "results" / "table.md").read_text()
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()]
    assert f"FedJETs{'' if best == shown[0] else ', ' + best} †" in names
    assert sum(name.endswith(" †") for name in names) == 1
    assert "FedAvg" in names
    assert "\n†: of the row's read-outs" in table
    assert chosen_reading([{"validation": {}}, *summaries], shown) == ""
    drawn: dict[str, str] = {}
    monkeypatch.setattr(figures, "draw", lambda title, rows, folder, readings: drawn.update(readings))
    draw_results(experiment, tmp_path / "results")
    name = f"FedJETs{'' if best == shown[0] else ', ' + best}"
    assert drawn == {"FedAvg": "top-1/none", name: best}


def test_clients_that_train_have_columns_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that serves nobody else leaves the columns of the unseen clients empty."""
    configure(tmp_path, monkeypatch)
    extra = [f"run.cache-dir={tmp_path / 'cache'}"]
    experiment = read_experiment(small(tmp_path, PERSONAL), extra, tmp_path / "runs")
    run_experiment(experiment, tmp_path / "results", in_this_process, Console(quiet=True), validate)
    rows = {
        line.split(" | ")[0].strip("| "): line for line in (tmp_path / "results" / "table.md").read_text().splitlines()
    }
    assert rows["method"].endswith("| own tests | all classes | specialist share |")
    summaries = [done(c.run_dir) for _, configs in experiment.rows for c in configs]
    for name, summary in zip(("alone", "FedAvg", "mixtures"), summaries, strict=True):
        assert summary is not None
        own = summary["participants"]
        share = f"{100 * own['specialist-share']:.2f}" if name == "mixtures" else "–"
        assert rows[name].endswith(f"| {100 * own['local']:.2f} | {100 * own['global']:.2f} | {share} |")
        assert len(own["clients"]) == 3
    assert rows["alone"].startswith("| alone | 1 | – | – | – | – | – | 0.0 | 0.0 |")
    figures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert figures == {"accuracy.png", "bytes.png", "participants.png"}


def test_brackets_in_a_failed_runs_reason_are_printed_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would end the whole comparison as markup that closes nothing, or hide what stands between them."""
    experiment = read_experiment(small(tmp_path), [], tmp_path / "runs")
    words = "client 3: KeyError: [/] [conceal]hidden :bomb:"

    def die(*_: object) -> None:
        raise FedjetsError(words)

    with pytest.raises(FedjetsError, match="2 of 2 runs failed"):
        run_experiment(experiment, tmp_path / "results", die, console, validate)
    printed = capsys.readouterr().out
    assert printed.count(f"failed: {words}") == 2
    assert f"FedAvg: {words}" in printed.replace("\n", " ")


def test_rows_on_text_are_compared_in_bits_per_byte(tmp_path: Path, text_run: TextRun) -> None:
    runs = {name: text_run(name) for name in ("fedmoe", "local")}
    rows = tuple((Row(name=name), (done_run.config,)) for name, done_run in runs.items())
    experiment = Experiment("text", tmp_path, rows)
    table = markdown(experiment)
    assert "| bits per byte |" in table
    for name, done_run in runs.items():
        own = done(done_run.config.run_dir)
        assert own is not None
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        served = own["bytes_served"] / max(1, own["client_rounds"]) / 1e3
        assert line.endswith(f"| {own['participants']['bits_per_byte']:.3f} | {served:.1f} |")
    draw_results(experiment, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"bits-per-byte.png", "participants.png"}


GAIN = """
title: text
preset: fedmoe
seeds: [1]
gain: {before: start, after: all}
rows:
  - {name: start, settings: {strategy.name: fedavg, run.rounds: 0}}
  - {name: all, settings: {strategy.name: fedavg}}
"""


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (GAIN.replace("after: all", "after: none"), "gain.after: no row 'none'"),
        (GAIN.replace("before: start", "before: rows"), "gain.before: no row 'rows'"),
        (GAIN.replace("before: start, ", ""), "gain.before: field required"),
        (GAIN.replace("after:", "behind:"), "gain"),
    ],
)
def test_a_gain_lies_between_two_rows(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "text.yaml"
    path.write_text(GAIN)
    assert [config.run.rounds for _, (config,) in read_experiment(path, ["run.rounds=3"], None).rows] == [0, 3]
    path.write_text(text)
    with pytest.raises(FedjetsError, match=word) as caught:
        read_experiment(path, [], None)
    assert "\n" not in str(caught.value)


def test_rows_on_text_tell_their_rounds_to_shares_of_a_gain(tmp_path: Path, text_run: TextRun) -> None:
    """The one from whom the gain is gets to 90 % of it, its start does not, and who trains alone has no rounds."""
    kinds = {"start": ("fedavg", 0), "all": ("fedavg", 4), "fedmoe": ("fedmoe", 2), "alone": ("local", 1)}
    runs = {name: text_run(kind, run__rounds=rounds) for name, (kind, rounds) in kinds.items()}
    rows = tuple((Row(name=name), (run.config,)) for name, run in runs.items())
    experiment = Experiment("text", tmp_path, rows, Gain(before="start", after="all"))
    lines = {line.name: line for line in lines_of(experiment)}
    courses = {name: figures.bits_course(read_metrics(run.config.run_dir)) for name, run in runs.items()}
    assert [at for at, _ in courses["start"]] == [0]
    (_, before), (last, after) = courses["start"][0], courses["all"][-1]
    assert after < before
    first = next(at for at, bits in courses["all"] if bits <= before - 0.9 * (before - after))
    assert lines["all"].reached["90%"] == [first]
    assert 0 < lines["all"].reached["99%"][0] <= last == 4  # type: ignore[operator]
    assert not lines["start"].reached
    assert not lines["alone"].reached
    table = markdown(experiment)
    assert "| bits per byte | kB served | rounds to 90% | rounds to 99% |" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| all |")]
    assert f"| {first} | " in row
    assert (row.count("|")) == table.splitlines()[3].count("|")
    draw_results(experiment, tmp_path)
    assert (tmp_path / "bits-per-byte.png").is_file()
