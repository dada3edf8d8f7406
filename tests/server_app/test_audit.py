"""What the server's audit log says of a run, and that it outlives what ends one."""

import json
from pathlib import Path

import pytest
from flwr.app import RecordDict

from fedjets_flwr.runs.audit import AUDIT_LOG, verify
from fedjets_flwr.wire.binding import fingerprint
from strategies.fedavg import FedAvg
from tests.support.audited import told
from tests.support.faults import tampering
from tests.support.runs import TinyRunner
from tests.support.sites import SiteGrid


def test_the_log_says_who_was_asked_what_by_which_key_and_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = TinyRunner(tmp_path, monkeypatch)("fedjets", SiteGrid, run__rounds=1)
    lines, cohort = told(finished.config.run_dir / AUDIT_LOG), finished.rounds.cohort
    assert [(line["what"], line.get("kind")) for line in lines] == [
        ("start", None), ("exchange", "query.prepare"), ("exchange", "query.route"), ("exchange", "train.fedjets"),
        ("exchange", "query.route"), ("exchange", "evaluate"), ("exchange", "query.inspect"), ("round", None),
        ("end", None),
    ]  # fmt: skip
    trained = lines[3]
    assert trained["answered"] == sorted(cohort.clients)
    assert {int(client) for client in trained["asked"]} == set(cohort.clients)
    for client, asked in trained["asked"].items():
        assert asked["key"] == fingerprint(SiteGrid.latest.sites[100 + int(client)].key)
        assert asked["vectors"][-1] == "gate"
    assert lines[0]["common_expert"] == finished.exchange.common.digest
    summary = json.loads((finished.config.run_dir / "summary.json").read_text())
    assert lines[-1]["weights_hash"] == summary["weights_hash"]


def test_a_reply_that_was_rejected_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(kind: str, server_round: int, content: RecordDict) -> None:
        for name, record in content.metric_records.items() if kind.startswith("train") else ():
            content[name] = type(record)(dict(record) | {"num-examples": 1})

    finished = TinyRunner(tmp_path, monkeypatch)(
        "fedavg", tampering(tamper), run__rounds=1, limits__max_failure_share=1.0
    )
    (trained,) = [line for line in told(finished.config.run_dir / AUDIT_LOG) if line.get("kind") == "train.fedavg"]
    assert trained["answered"] == []
    assert set(trained["failed"]) == set(map(str, finished.rounds.cohort.clients))
    assert all("bad reply: num-examples" in reason for reason in trained["failed"].values())


def test_a_log_goes_on_over_a_broken_run_a_torn_line_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = TinyRunner(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(FedAvg, "after_merge", lambda self, t: {}[t] if t == 2 else {})
        with pytest.raises(KeyError):
            run("fedavg", run__name="broken", run__rounds=2)
    folder = tmp_path / "runs" / "broken"
    assert told(folder / AUDIT_LOG)[-1]["what"] == "broken off"
    killed = f'{{"before": "{verify(folder / AUDIT_LOG).head}", "time": "20'
    with (folder / AUDIT_LOG).open("ab") as file:
        file.write(killed.encode())
    run("fedavg", run__name="broken", run__rounds=2, run__resume=True)
    found = verify(folder / AUDIT_LOG)
    assert len(found.torn) == 1
    lines = (folder / AUDIT_LOG).read_text().splitlines()
    after = [json.loads(line) for line in lines[found.torn[0] :]]
    assert after[0]["what"] == "start"
    assert after[0]["resumed"]
    assert after[-1]["what"] == "end"
    assert len({json.loads(line)["before"] for i, line in enumerate(lines, 1) if i not in found.torn}) == found.lines
