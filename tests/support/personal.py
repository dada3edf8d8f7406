"""A tiny real run on the digits, finished, for tests of what is made from one."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from fedjets_flwr.cli.app import main
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.datasets import Images
from fedjets_flwr.runs.trained_run import TrainedRun, open_run
from tests.support.in_process import run_in_process

TINY: dict[str, Scalar] = {
    "run__rounds": 2, "run__evaluate_every": 2, "run__name": "run", "model__width": 8, "gate__hidden": 16,
    "partition__clients": 8, "partition__unseen_clients": 2, "partition__samples_per_client": 30,
    "cohort__anchors": 3, "cohort__normals": 3, "common_expert__target_accuracy": 0.3,
}  # fmt: skip


def finish(factory: pytest.TempPathFactory, **changes: Scalar) -> TrainedRun:
    """Return a run with some settings changed; runs share their common expert and embeddings."""
    folder, cache = factory.mktemp("finished"), factory.getbasetemp() / "personal-cache"
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(folder, patch, **(TINY | {"run__cache_dir": str(cache)} | changes))
    return open_run(folder / "runs" / "run")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Return the exit code of a command of `fedjets`, done in this process."""
    monkeypatch.setattr(sys, "argv", ["fedjets", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def drawn(folder: Path, images: Images, classed: bool = False) -> Path:
    """Write images as PNG, flat or in class folders; sorted paths are not the order of the samples then."""
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        path = folder / (str(int(label)) if classed else "") / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(path)
    return folder
