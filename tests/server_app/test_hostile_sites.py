"""Sites that lie about whom they speak for, say nothing, or hang: the run goes on, and names them."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as form
from flwr.app import Message, MetricRecord, RecordDict

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.binding import PINS, fingerprint, roster_line
from tests.support.faults import Runner, clients_of, same_weights, tampering
from tests.support.in_process import Finished
from tests.support.sites import Site, SiteGrid, new_key

ROUNDS = {"limits__node_seconds": 0.3, "run__evaluate_every": 1}
LIAR = 104


def records(run: Finished) -> list[dict[str, Any]]:
    return read_metrics(run.config.run_dir)


def grid(
    begin: Callable[[SiteGrid], None], before: Callable[[SiteGrid, Message], None] | None = None
) -> type[SiteGrid]:
    class Changed(SiteGrid):
        def begin(self) -> None:
            begin(self)

        def before(self, message: Message) -> None:
            if before is not None:
                before(self, message)

    return Changed


def nothing(sites: SiteGrid) -> None:
    """All sites are honest."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("sites"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


@pytest.fixture(scope="module")
def honest(runner: Runner) -> Finished:
    return runner(SiteGrid, **ROUNDS)


def test_a_deployment_of_honest_sites_refuses_nobody(honest: Finished) -> None:
    assert [record["failures"] for record in records(honest)] == [{}, {}, {}]
    assert not any("refused_nodes" in record or "resting" in record for record in records(honest))


def test_a_reply_that_comes_again_in_a_later_round_counts_for_nothing(runner: Runner, honest: Finished) -> None:
    class Replaying(SiteGrid):
        def begin(self) -> None:
            self.seen: list[Message] = []

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            new = super().pull_messages(message_ids)
            again = [*self.seen, *new, *new]
            self.seen += new
            return again

    run = runner(Replaying, **ROUNDS)
    assert same_weights(run, honest)
    assert [record["failures"] for record in records(run)] == [{}, {}, {}]


def claims(sites: SiteGrid, client: int) -> None:
    sites.sites[LIAR].config["client-id"] = client


@pytest.mark.parametrize("claimed", [0, 13])
def test_a_client_that_two_sites_claim_at_the_start_is_one_of_theirs_and_no_other_is_lost(
    runner: Runner, claimed: int
) -> None:
    """Whoever is heard first keeps it, where no roster says whose it is."""
    run = runner(grid(lambda sites: claims(sites, claimed)), **ROUNDS)
    (refused,) = records(run)[0]["refused_nodes"].items()
    sites = SiteGrid.latest.sites
    assert refused[0] in {fingerprint(sites[LIAR].key), fingerprint(sites[100 + claimed].key)}
    assert refused[1] == f"it claims client {claimed}, which another key had before"
    assert {client for record in records(run) for client in record["failures"]} <= {"4"}


def test_a_client_outside_the_run_costs_the_site_that_claims_it(runner: Runner) -> None:
    run = runner(grid(lambda sites: claims(sites, 99)), **ROUNDS)
    (reason,) = records(run)[0]["refused_nodes"].values()
    assert "give client-id, a number from 0 to 14" in reason
    assert {client for record in records(run) for client in record["failures"]} <= {"4"}


def test_one_error_gives_a_site_no_others_clients(runner: Runner, honest: Finished) -> None:
    """It fails once, is described again, and then claims one client after the other: all refused, none lost."""
    turn = {"claimed": 0}

    def before(sites: SiteGrid, message: Message) -> None:
        liar = sites.sites[LIAR]
        ours = message.metadata.dst_node_id == LIAR
        if ours and message.metadata.message_type == "query.describe" and liar.failing:
            liar.failing, turn["claimed"] = set(), turn["claimed"] + 1
            claims(sites, turn["claimed"] % 4)
        elif message.metadata.message_type.startswith("train") and not turn["claimed"]:
            liar.failing = {message.metadata.message_type, "query.route"}

    settings = ROUNDS | {"run__rounds": 8, "run__evaluate_every": 8}
    run = runner(grid(nothing, before), **settings)
    lost = {client for record in records(run) for client in record["failures"]}
    assert turn["claimed"]
    assert lost <= {"4"}
    assert any("which another key had before" in str(record.get("refused_nodes")) for record in records(run))


def test_pins_hold_over_a_resume(runner: Runner) -> None:
    """A site whose key changes while the run is down is not believed any more; the others are."""
    keys: dict[int, bytes] = {}

    def begin(sites: SiteGrid) -> None:
        for node, site in sites.sites.items():
            site.key = keys.setdefault(node, site.key)

    settings = ROUNDS | {"run__name": "pinned", "run__checkpoint_every": 1, "limits__max_failure_share": 1.0}
    runner(grid(begin), **settings | {"run__rounds": 2}).let_go()
    keys[LIAR] = new_key()
    run = runner(grid(begin), **settings | {"run__rounds": 3, "run__resume": True})
    assert records(run)[2]["refused_nodes"] == {
        fingerprint(keys[LIAR]): "it claims client 4, which another key had before"
    }
    assert (run.config.run_dir / PINS).is_file()


def with_roster(folder: Path, swap: bool) -> Callable[[SiteGrid], None]:
    """Write the roster of the grid's sites; ``swap``: two of the keys change places in it."""

    def begin(sites: SiteGrid) -> None:
        def line(client: int, site: Site) -> str:
            key = form.load_pem_public_key(site.key).public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
            return roster_line(client, "train" if client < 12 else "unseen", key.decode())

        order = list(sites.sites.values())
        if swap:
            order[4], order[5] = order[5], order[4]
        (folder / "roster").write_text("# the sites\n" + "".join(map(line, range(15), order)))

    return begin


@pytest.mark.parametrize("swap", [False, True])
def test_with_a_roster_a_client_belongs_to_its_key(runner: Runner, tmp_path: Path, swap: bool) -> None:
    (tmp_path / "roster").touch()  # settings are read before the grid is made
    begin = with_roster(tmp_path, swap)
    run = runner(grid(begin), **ROUNDS, nodes__roster=str(tmp_path / "roster"), limits__max_failure_share=1.0)
    refused = {key: why for record in records(run) for key, why in record.get("refused_nodes", {}).items()}
    keys = [fingerprint(SiteGrid.latest.sites[100 + client].key) for client in (4, 5)]
    said = "it claims client {}, which nodes.roster does not give to its key"
    assert refused == ({keys[0]: said.format(4), keys[1]: said.format(5)} if swap else {})


@pytest.mark.parametrize(
    "text, reason",
    [("0 train nonsense", "line 1: no public key"), ("x train k", "line 1: not 'client-id"),
     ("12 train k", "client 12 is unseen by partition.clients"), ("0 train", "no public key")],
)  # fmt: skip
def test_a_bad_roster_ends_the_run_at_once_with_its_line(
    runner: Runner, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "roster").write_text(text)
    with pytest.raises(FedjetsError, match=reason):
        runner(SiteGrid, nodes__roster=str(tmp_path / "roster"))


@pytest.mark.parametrize("said", [10_000_000, 41])
def test_a_simulation_believes_no_client_that_has_more_samples_than_the_partition(runner: Runner, said: int) -> None:
    def tamper(message_type: str, at: int, content: RecordDict) -> None:
        if message_type == "query.prepare" and 2 in clients_of(content):
            content["client.2"] = MetricRecord(dict(content.metric_records["client.2"]) | {"num-examples": said})

    run = runner(tampering(tamper))
    assert 2 not in run.num_samples
    assert {client: n for client, n in run.num_samples.items() if client < 12} == dict.fromkeys({*range(12)} - {2}, 40)


def mute(sites: SiteGrid) -> None:
    sites.sites[LIAR].silent = {"query.describe"}


def test_a_mute_site_is_waited_for_less_and_less_and_named(runner: Runner) -> None:
    run = runner(grid(mute), **ROUNDS | {"run__rounds": 8, "run__evaluate_every": 8})
    key = fingerprint(SiteGrid.latest.sites[LIAR].key)
    named = [record["round"] for record in records(run) if key in record.get("refused_nodes", {})]
    assert named[0] == 1
    assert len(named) <= 4  # rounds between: 1, 2, 4, ..
    assert {client for record in records(run) for client in record["failures"]} <= {"4"}


def hangs(kind: str) -> Callable[[SiteGrid], None]:
    def begin(sites: SiteGrid) -> None:
        sites.sites[LIAR].silent = {kind}

    return begin


def test_a_site_that_hangs_is_given_up_after_the_grace_and_asked_less_often(runner: Runner) -> None:
    """Client 4 is an anchor and drawn in every round."""
    run = runner(
        grid(hangs("train.fedjets")),
        **ROUNDS | {"run__rounds": 6, "run__evaluate_every": 6},
        limits__enough_share=0.5,
        limits__grace_seconds=0.1,
    )
    late = [record["round"] for record in records(run) if "4" in record["failures"]]
    resting = [record["round"] for record in records(run) if record.get("resting") == [4]]
    assert (late, resting) == ([1, 3, 6], [2, 4, 5])
    assert "no reply limits.grace-seconds = 0.1 after" in records(run)[0]["failures"]["4"]
    asked = [kind for node, kind in SiteGrid.latest.kinds if node == LIAR and kind.startswith("train")]
    assert len(asked) == 3


@pytest.mark.parametrize("kind", ["evaluate", "query.route"])
def test_a_run_goes_on_without_the_sites_that_score_it(
    runner: Runner, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """They train nothing, and may be a single one: what the others train is not lost with it."""

    def begin(sites: SiteGrid) -> None:
        for client in (12, 13, 14):
            sites.sites[100 + client].silent = {kind}

    settings: dict[str, Scalar] = {**ROUNDS, "run__evaluate_every": 1, "limits__exchange_seconds": 2.0}
    run = runner(grid(begin), **settings)
    whole = runner(SiteGrid, **settings)
    assert same_weights(run, whole)
    assert "round 3: no unseen client answered; client 12: no reply" in caplog.text
    assert not any("evaluation" in record for record in records(run))
    summary = json.loads((run.config.run_dir / "summary.json").read_text())
    assert (summary["status"], summary["accuracy"]) == ("completed", None)


def test_without_late_sites_closing_early_changes_no_bit(runner: Runner, honest: Finished) -> None:
    assert same_weights(runner(SiteGrid, **ROUNDS, limits__enough_share=0.5, limits__grace_seconds=5.0), honest)


def test_messages_live_no_longer_than_their_deadline(runner: Runner) -> None:
    lives: dict[str, float] = {}

    def before(sites: SiteGrid, message: Message) -> None:
        lives[message.metadata.message_type] = message.metadata.ttl

    runner(grid(nothing, before), **ROUNDS, limits__exchange_seconds=77.0)
    assert lives.pop("query.describe") == 0.3
    assert set(lives.values()) == {77.0}
