"""A wheel in an environment of its own, with no checkout anywhere, does its main job."""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ran(*command: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=os.environ | environment, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_runs_without_a_checkout(tmp_path: Path) -> None:
    """Its dependencies are those of the tests' environment; this package is not, since its path hook stays behind."""
    ran(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT, folder=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    fresh, elsewhere = tmp_path / "fresh", tmp_path / "elsewhere"
    venv.create(fresh, with_pip=False)
    elsewhere.mkdir()
    (library,) = (fresh / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", fresh / "bin" / "python", "install", "--quiet", "--no-deps"]
    ran(*install, wheel, folder=elsewhere)
    (library / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    own = {"PYTHONPATH": "", "PATH": f"{fresh / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = ran(fresh / "bin" / "python", "-c", "import fedjets_flwr; print(fedjets_flwr.__file__)", folder=elsewhere)
    assert found.startswith(str(library))
    assert "cifar10-laptop" in ran(fresh / "bin" / "fedjets", "presets", folder=elsewhere, **own)
    few = "run.rounds=2 run.name=wheel partition.clients=8 cohort.normals=2 common-expert.target-accuracy=0.3"
    ran(fresh / "bin" / "fedjets", "run", "--preset", "digits", "-c", few, folder=elsewhere, **own)
    summary = json.loads((elsewhere / "runs" / "wheel" / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("completed", 2)
