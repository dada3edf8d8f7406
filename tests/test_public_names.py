"""What a user imports: light, complete, and content with any way to name a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedjets_flwr
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.data.image_folder import to_picture
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.report.page import write_report
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.trained_run import TrainedRun
from tests.support.personal import finish


class Somewhere:
    """A path of the user's own kind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return finish(tmp_path_factory)


@pytest.mark.parametrize("way", [str, Path, Somewhere])
def test_a_file_may_be_named_in_any_way(run: TrainedRun, tmp_path: Path, way: type) -> None:
    def named(*parts: str) -> os.PathLike[str]:
        return way(tmp_path.joinpath(*parts))  # type: ignore[no-any-return]

    (tmp_path / "images").mkdir()
    to_picture(open_client(run.config, 8).images.pixels[0]).save(tmp_path / "images" / "one.png")
    made = fedjets_flwr.personalise(fedjets_flwr.open_run(way(run.folder)), named("images"))
    made.save(named("bundle"))
    loaded = fedjets_flwr.Personaliser.load(named("bundle"))
    assert len(loaded.predict(named("images"))) == 1
    assert len(loaded.predict(named("images", "one.png"))) == 1
    assert len(loaded.predict([named("images", "one.png")] * 2)) == 2
    save_common_expert(run.common, named("common.safetensors"))
    assert load_common_expert(named("common.safetensors")).digest == run.common.digest
    assert write_report(way(run.folder), named("page.html")).is_file()
    assert read_recorded(way(run.folder)).finished
    assert draw_plots(way(run.folder))


def test_importing_the_package_imports_no_torch() -> None:
    """A deployed client's process serves one message, and Flower imports the package first."""
    script = (
        "import sys, fedjets_flwr; light = 'torch' not in sys.modules;"
        "from fedjets_flwr import Config, Personaliser, open_run, personalise;"
        "sys.exit(0 if light and 'torch' in sys.modules else 1)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedjets_flwr.nothing
    assert all(hasattr(fedjets_flwr, name) for name in fedjets_flwr.__all__)
