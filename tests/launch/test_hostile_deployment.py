"""Real daemons, a roster, and sites that lie, say nothing, refuse and die: the run ends well and names each."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedjets_flwr.runs.audit import verify
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.binding import fingerprint
from tests.support.deployed import SIX_AND_TWO, Deployed, deployed
from tests.support.processes import descendants

KILLED, REFUSES, MUTE, LIAR, CLAIMED = 1, 2, 3, 4, 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_with_four_bad_sites_of_six_ends_well_and_names_each(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('algorithms = ["fedavg"]\n')
    settings = SIX_AND_TWO | {
        "run.rounds": 4, "limits.node-seconds": 60, "limits.exchange-seconds": 120, "limits.enough-share": 0.3,
        "limits.grace-seconds": 10, "limits.max-failure-share": 1.0,
    }  # fmt: skip
    bad = {REFUSES: {"policy": str(policy)}, LIAR: {"client-id": CLAIMED}}
    with deployed(tmp_path, nodes=bad, **settings) as running:
        stop(running.deployment.site_pid(MUTE))
        process = running.start("-c", f"nodes.roster={running.deployment.roster}")
        running.wait_for_round(1)
        running.deployment.kill_site(KILLED)
        summary = running.finish(process)
        liar = key_of(running, LIAR)
        log = (running.deployment.log(f"site{REFUSES}")).read_text()
    rounds: list[dict[str, Any]] = read_metrics(running.here)
    assert summary["status"] == "completed"
    assert [record["round"] for record in rounds] == [1, 2, 3, 4]
    named = {int(client): why for record in rounds for client, why in record["failures"].items()}
    assert set(named) == {KILLED, REFUSES, MUTE, LIAR}
    assert "refused by its policy: algorithms = fedavg; the run has fedjets" in named[REFUSES]
    assert "refused by its policy" in log and "Traceback" not in log
    assert str(KILLED) not in rounds[0]["failures"]
    told = {key: why for record in rounds for key, why in record.get("refused_nodes", {}).items()}
    assert told[liar] == f"it claims client {CLAIMED}, which nodes.roster does not give to its key"
    assert set(told) <= {liar, *(key_of(running, site) for site in (MUTE, KILLED))}
    assert set(summary["per_client_accuracy"]) == {"6", "7"}
    assert verify(running.server / "audit.jsonl").torn == ()


def key_of(running: Deployed, site: int) -> str:
    return fingerprint((running.deployment.keys / f"site-{site}.pub").read_bytes())


def stop(pid: int) -> None:
    """Let a daemon hold its connections and say nothing more; its guard goes on, and kills it in the end."""
    for each in descendants(pid):
        os.kill(each, signal.SIGSTOP)
