"""The benchmarks' own parts; what they measure is measured by `make bench`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import gpu, held
from benchmarks.fixtures import settings
from benchmarks.outcome import Bound, Outcome, Plan, Samples, ratios
from benchmarks.paced import Paced, Stuck, descendants
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sources import read_preset
from fedjets_flwr.wire.transport import SharedFolder

ROOT = Path(__file__).parents[2]
TICKING = """
import json, sys, time
for n in range(1000):
    time.sleep(0.05)
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"round": n}) + "\\n")
"""


def outcome(value: float) -> Outcome:
    return Outcome("aggregate", "about", [Bound("a / b", Samples((value, value, 9.0)), 1.0)], {"a, s": Samples((1.0,))})


def test_a_bound_counts_by_the_median_and_says_so_at_the_end_of_its_line() -> None:
    assert Bound("a / b", Samples((0.9, 1.0, 7.0)), 1.0).line().endswith(" ok")
    assert Bound("a / b", Samples((0.9, 1.1, 7.0)), 1.0).line().endswith(" MISS")


def test_ratios_pair_what_was_measured_side_by_side() -> None:
    assert ratios([1.0, 4.0], [2.0, 2.0]).values == (0.5, 2.0)


@pytest.mark.parametrize(("value", "code"), [(0.5, 0), (2.0, 1)])
def test_a_missed_bound_is_the_exit_code_and_both_files_are_written(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.aggregate.measure", lambda plan: outcome(value))
    assert runner.main(["aggregate", "--output", str(tmp_path)]) == code
    assert capsys.readouterr().out.rstrip().endswith("MISS" if code else "ok")
    assert json.loads((tmp_path / "aggregate.json").read_text())["bounds"][0]["holds"] is not bool(code)
    assert "a / b" in (tmp_path / "README.md").read_text()


def test_tiny_sizes_never_overwrite_measured_results() -> None:
    with pytest.raises(SystemExit):
        runner.main(["--quick"])


def test_averages_are_timed_beside_flowers(tmp_path: Path) -> None:
    assert runner.main(["aggregate", "--quick", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "aggregate.json").read_text())
    assert [bound["limit"] for bound in written["bounds"]] == [0.2, 1.0]
    assert written["machine"]["cores"] >= 1


def test_what_experts_add_to_the_tensors_of_training_is_what_is_computed(tmp_path: Path) -> None:
    few, many = (held.tensors(held.WIDER, experts, tmp_path) for experts in (8, 16))
    added = held.computed(held.WIDER, 16) - held.computed(held.WIDER, 8)
    assert many - few == pytest.approx(added, rel=0.01)
    assert few > held.computed(held.WIDER, 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["round", "precision", "transport", "growth", "start", "held"])
def test_every_benchmark_of_our_own_still_runs(name: str, tmp_path: Path) -> None:
    """In a process of its own; the rivals' environments are not for a test."""
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / f"{name}.json").read_text())["samples"]


def test_endless_runs_are_settings_that_there_are(tmp_path: Path) -> None:
    assert settings(Plan(1, True, tmp_path, tmp_path), "endless", {}).run.rounds > 10**5


def test_without_a_gpu_its_benchmark_is_one_line_and_works_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == gpu.NO_GPU
    assert capsys.readouterr().err.startswith("no GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--output", str(tmp_path)])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["facts"]["device"] == "cpu"
    assert abs(found["bounds"][0]["median"]) < 1e-9  # the CPU agrees with itself
    assert all(sample["median"] > 0 for sample in found["samples"].values())


def test_hours_are_of_all_samples_that_a_preset_trains_on() -> None:
    """1,250 rounds of five anchors, which train one expert, and five clients of two experts; 500 images each."""
    config = Config.from_flat(read_preset("cifar10-paper"))
    assert gpu.hours(config, 1000.0) == pytest.approx(1250 * (5 + 5 * 2) * 500 / 1000 / 3600)


@pytest.mark.slow
def test_averaging_stays_far_ahead_of_flowers(tmp_path: Path) -> None:
    """`make bench` bounds it by 0.2; a busy machine may double that."""
    runner.main(["aggregate", "--rounds", "3", "--output", str(tmp_path)])
    found = {
        bound["name"]: bound["median"] for bound in json.loads((tmp_path / "aggregate.json").read_text())["bounds"]
    }
    assert found["seconds, ours / flwr"] < 0.4
    assert found["peak memory beyond the new experts, vectors"] < 1


@pytest.mark.slow
def test_a_model_through_shared_memory_costs_about_two_copies() -> None:
    """One copy into memory that is there already, one out of it; no page is mapped anew."""
    folder, vector, target = SharedFolder(), torch.rand(20_000_000), torch.zeros(20_000_000)
    try:
        ours, copies = [], []
        for turn in range(8):
            transport = folder.begin({"expert.0": 4 * len(vector)}, "float32", reuse=True)
            assert transport is not None
            begun = time.perf_counter()
            target.copy_(transport.decode("expert.0", transport.encode("expert.0", vector), len(vector)))
            middle = time.perf_counter()
            target.copy_(vector)
            if turn > 1:
                ours.append(middle - begun)
                copies.append(time.perf_counter() - middle)
        assert ratios(ours, copies).median < 3.5
    finally:
        folder.close()


def test_a_program_is_paused_between_measurements(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    process = subprocess.Popen([sys.executable, "-c", TICKING, str(lines)])
    try:
        side = Paced(lines, lambda: [process.pid], lambda: process.poll() is None)
        assert len(side.rounds(3)) == 3
        held = len(lines.read_text().splitlines())
        time.sleep(0.5)
        assert len(lines.read_text().splitlines()) == held
        # The pause of half a second is in no round, and the round that it cut through does not count.
        assert min(side.rounds(2)) > 0.04
        assert len(side.records) >= 6
    finally:
        side.resume()
        process.kill()
        process.wait()


def test_a_program_that_ends_early_is_noticed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    with pytest.raises(Stuck, match="0 of 1 lines"):
        Paced(tmp_path / "none", lambda: [], lambda: process.poll() is None).rounds(1)


def test_descendants_are_found_over_generations() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not any("time.sleep(30)" in c for c in descendants(process.pid).values()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            subprocess.run(["kill", "-9", str(pid)], check=False)
        process.wait()
