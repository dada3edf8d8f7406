"""Sites that are silent, on clients of a few samples: whom a round asks, and what it records of the others."""

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from rich.console import Console

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.launch.follow import print_summary
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.binding import fingerprint
from tests.support.in_process import Finished
from tests.support.runs import TinyRunner
from tests.support.sites import SiteGrid

QUICK: dict[str, Scalar] = {
    "limits__node_seconds": 0.2, "limits__exchange_seconds": 0.3,
    "limits__max_failure_share": 1.0, "cohort__anchors": 3, "cohort__normals": 4, "run__rounds": 6,
}  # fmt: skip


@pytest.fixture
def tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRunner:
    return TinyRunner(tmp_path, monkeypatch)


def records(run: Finished) -> list[dict[str, Any]]:
    return read_metrics(run.config.run_dir)


def silent(client: int, *kinds: str) -> type[SiteGrid]:
    class Silent(SiteGrid):
        def begin(self) -> None:
            self.sites[100 + client].silent = set(kinds)

    return Silent


def asked(client: int, kind: str) -> int:
    return SiteGrid.latest.kinds.count((100 + client, kind))


def test_a_client_that_hangs_in_training_is_asked_less_often(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedavg", silent(3, "train.fedavg"), **QUICK)
    found = records(run)
    assert [record.get("resting") for record in found] == [None, [3], None, [3], [3], None]
    assert [list(record["failures"]) for record in found] == [["3"], [], ["3"], [], [], ["3"]]
    assert [3 in record["cohort"] for record in found] == [True, False, True, False, False, True]
    assert asked(3, "train.fedavg") == 3


def test_a_client_that_hangs_in_routing_is_asked_less_often(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedjets", silent(5, "query.route"), **QUICK | {"run__evaluate_every": 6})
    assert [record.get("resting") for record in records(run)] == [None, [5], None, [5], [5], None]
    assert asked(5, "query.route") == 3


def test_a_client_that_hangs_when_it_is_prepared_is_asked_less_often(tiny_run: TinyRunner) -> None:
    """It does not answer before the rounds, nor in round 1, and rests in round 2."""
    run = tiny_run("fedavg", silent(3, "query.prepare"), **QUICK)
    found = records(run)
    assert [record.get("resting") for record in found] == [None, [3], None, [3], [3], None]
    assert all("3" in record["failures"] for record in found[::2][:2])
    assert asked(3, "query.prepare") == 4


def test_a_round_waits_for_a_mute_site_less_and_less(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedavg", silent(3, "query.describe"), **QUICK | {"run__evaluate_every": 6})
    named = [record["round"] for record in records(run) if "refused_nodes" in record]
    assert named == [1, 2, 5]
    assert all(record["failures"].keys() == {"3"} for record in records(run))


def test_a_round_waits_for_an_unseen_clients_mute_site_where_it_evaluates(tiny_run: TinyRunner) -> None:
    class Restarted(SiteGrid):
        def before(self, message: Message) -> None:
            if message.metadata.message_type.startswith("train") and 108 in self.sites:
                site = self.sites[208] = self.sites.pop(108)
                site.silent = {"query.describe"}

    run = tiny_run("fedavg", Restarted, **QUICK | {"run__evaluate_every": 3})
    key = fingerprint(SiteGrid.latest.sites[208].key)
    assert [record.get("refused_nodes", {}).keys() for record in records(run)] == [
        set(),
        set(),
        {key},
        set(),
        set(),
        {key},
    ]
    assert [list(record["failures"]) for record in records(run)] == [[], [], ["8"], [], [], ["8"]]


def test_an_unseen_client_that_could_not_be_prepared_at_first_is_scored_once_it_can(tiny_run: TinyRunner) -> None:
    class Late(SiteGrid):
        """Mute until the first client trains in round 2."""

        trained = 0

        def begin(self) -> None:
            self.sites[108].silent = {"query.prepare"}

        def before(self, message: Message) -> None:
            self.trained += message.metadata.message_type.startswith("train")
            if self.trained > 10:
                self.sites[108].silent = set()

    run = tiny_run("fedavg", Late, **QUICK | {"run__evaluate_every": 1, "run__rounds": 4})
    found = records(run)
    scored = [list(record["evaluation"]["per_client_accuracy"]) for record in found]
    assert scored[0] == ["7"]
    assert scored[-1] == ["7", "8"]
    assert "could not be prepared" in found[0]["failures"]["8"]
    assert found[-1]["failures"] == {}


def test_a_client_that_rests_is_not_routed_ahead_of_its_round(tiny_run: TinyRunner) -> None:
    """Where every round evaluates, the next cohort is routed along with the unseen clients."""
    run = tiny_run("fedjets", silent(5, "query.route"), **QUICK | {"run__evaluate_every": 1})
    assert any("resting" in record for record in records(run))
    assert asked(5, "query.route") <= 4


def test_controls_are_of_the_sites_that_came_late_too(tiny_run: TinyRunner) -> None:
    """The accuracy is, and what it gains is over those."""

    class Late(SiteGrid):
        def begin(self) -> None:
            self.sites[107].silent = self.sites[108].silent = {"query.prepare"}

        def before(self, message: Message) -> None:
            if message.metadata.message_type.startswith("train"):
                self.sites[107].silent = self.sites[108].silent = set()

    late = tiny_run("fedavg", Late, **QUICK | {"run__evaluate_every": 1, "run__rounds": 4})
    wanted, found = (
        read_recorded(run.config.run_dir).results
        for run in (tiny_run("fedavg", SiteGrid, **QUICK | {"run__rounds": 4}), late)
    )
    for key in ("controls", "common_expert_per_client", "common_expert_accuracy"):
        assert found[key] == wanted[key]
    assert set(found["common_expert_per_client"]) == {"7", "8"}
    print_summary(found, late.config.run_dir, Console(quiet=True))


def test_a_site_that_opts_out_on_the_way_costs_nobody_else_the_round(tiny_run: TinyRunner) -> None:
    """The members of an ensemble are drawn anew, and all that are asked have one to train."""

    class OptsOut(SiteGrid):
        def before(self, message: Message) -> None:
            if message.metadata.message_type == "evaluate" and 103 in self.sites:
                site = self.sites[203] = self.sites.pop(103)
                site.config["opt-out"] = True

    own = {
        "cohort__anchors": 0,
        "cohort__normals": 2,
        "ensembles__members": 2,
        "run__evaluate_every": 1,
        "run__seed": 3,
    }
    run = tiny_run("ensembles", OptsOut, **QUICK | own)
    assert 3 in run.strategy.opted_out
    found = records(run)
    assert [list(record["failures"]) for record in found[1:]] == [[]] * 5
    assert all(len(record["cohort"]) >= 2 for record in found)
    assert not any(3 in record["cohort"] for record in found[1:])


def test_a_site_whose_common_expert_is_cut_off_gets_it_anew(tiny_run: TinyRunner) -> None:
    """A power cut may leave half a file: it costs the client a round, not all that are to come."""

    class CutsOff(SiteGrid):
        rounds = 0

        def before(self, message: Message) -> None:
            if message.metadata.message_type.startswith("train") and message.metadata.dst_node_id == 103:
                self.rounds += 1
                if self.rounds == 2:
                    (path,) = (self.config.cache_dir / "site3" / "common-experts").glob("*.safetensors")
                    path.write_bytes(path.read_bytes()[:64])

    run = tiny_run("fedavg", CutsOff, **QUICK | {"limits__exchange_seconds": 5.0})
    failed = [record["failures"] for record in records(run)]
    assert [list(failures) for failures in failed] == [[], ["3"], [], [], [], []]
    assert "is damaged: it is fetched anew" in failed[1]["3"]
