"""What a deployed site lets a run decide, through the real handlers: its paths, its policy, what leaves it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from flwr.app import Context, RecordDict

from client_app.app import config_of
from fedjets_flwr.config.schema import Scalar
from tests.support.faults import same_weights
from tests.support.in_process import Finished
from tests.support.runs import TinyRunner
from tests.support.sites import SiteGrid

Run = Callable[..., Finished]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return TinyRunner(tmp_path, monkeypatch)


THEIRS: dict[str, Scalar] = {
    "run.output-dir": "/etc", "run.cache-dir": "/root/.ssh", "data.dir": "/home", "common-expert.path": "/etc/passwd",
    "nodes.roster": "/etc/shadow",
}  # fmt: skip


def test_a_deployed_site_takes_no_path_from_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("FEDJETS_CACHE", str(tmp_path / "cache"))
    flat = config_of(Context(1, 1, {"client-id": 3, "data-dir": "/data"}, RecordDict(), THEIRS)).flat()
    assert {key: flat[key] for key in THEIRS} == dict.fromkeys(THEIRS, "") | {"data.dir": "/data"}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    flat = config_of(Context(1, 1, {}, RecordDict(), THEIRS)).flat()
    assert {key: flat[key] for key in THEIRS} == THEIRS


def test_attackers_exist_in_a_simulation_alone(run: Run) -> None:
    attack: dict[str, Scalar] = {"attack__kind": "sign-flip", "attack__share": 1.0, "limits__max_growth": 0.0}
    honest = run("fedjets", SiteGrid)
    assert same_weights(run("fedjets", SiteGrid, **attack), honest)
    assert not same_weights(run("fedjets", **attack), honest)
