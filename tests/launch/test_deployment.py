"""Real daemons over TLS with registered keys; the quick tests share one small deployment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.credentials import make_server_credentials, make_site_keys
from fedjets_flwr.launch.daemons import kill_daemon
from fedjets_flwr.launch.deployment import Keys
from fedjets_flwr.launch.superlink import to_toml
from fedjets_flwr.moe.structure import initial_sets
from fedjets_flwr.personalize.language import personalise_text
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_language_run import open_language_run
from fedjets_flwr.runs.trained_run import open_run
from tests.support.deployed import ONE_EACH, QUICK, SIX_AND_TWO, Deployed, deployed
from tests.support.other_users import ASK, LIST, NOBODY, check_hung_up, listeners, needs_another_user, run_as
from tests.support.processes import descendants
from tests.support.text import TEXT_SIZE, write_domains

MESSAGE_OVERHEAD = 6000
"""Bytes of one message and its reply beside the vectors (about 4,200): digests, numbers, Flower's own fields."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two training sites and an unseen one that did a round."""
    with deployed(tmp_path_factory.mktemp("small"), **ONE_EACH) as running:
        running.finish(running.start())
        yield running


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Six training sites and two unseen ones that did three rounds; the daemons are gone, what they wrote is there."""
    with deployed(tmp_path_factory.mktemp("big"), **SIX_AND_TWO) as running:
        running.finish(running.start())
    yield running


def check_results(running: Deployed, rounds: int) -> None:
    """What a user finds on the own machine is what the server wrote."""
    here, server = running.here, running.server
    summary = json.loads((here / "summary.json").read_text())
    assert summary == json.loads((server / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == rounds
    assert summary["failures"] == 0
    assert 0 <= summary["accuracy"] <= 1
    assert read_metrics(here) == read_metrics(server)
    assert {path.name for path in (here / "plots").iterdir()} == {
        "accuracy.png", "clients.png", "experts.png", "load.png"
    }  # fmt: skip
    assert (here / "config.json").read_bytes() == (server / "config.json").read_bytes()
    assert f"round {rounds}/{rounds}" in (here / "run.log").read_text()
    assert "fedjets-announce" not in (here / "run.log").read_text()
    assert not (here / "checkpoints").exists()  # models stay on the server
    assert list((server / "checkpoints").glob("*.safetensors"))


def check_bytes(running: Deployed, messages: int) -> None:
    """What Flower counted between SuperLink and SuperNodes is what the run says it moved, plus the messages' frames."""
    summary = json.loads((running.here / "summary.json").read_text())
    traffic = json.loads((running.here / "flower.json").read_text())["network-traffic"]
    extra = traffic["total-bytes"] - summary["wire_bytes_total"]
    assert summary["wire_bytes_total"] >= summary["wire_bytes"] > 0
    assert 0 < extra < MESSAGE_OVERHEAD * messages


def test_the_results_of_a_superlink_elsewhere_come_here(small: Deployed) -> None:
    check_results(small, rounds=1)


def test_flower_counts_the_same_bytes(small: Deployed) -> None:
    check_bytes(small, messages=2 * 3 + 2 + 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_name_that_is_taken_on_either_machine_is_refused_in_one_line(small: Deployed, tmp_path: Path) -> None:
    before = (small.server / "summary.json").read_bytes()
    laptop = replace(small, here=tmp_path / small.here.name)
    for running in (small, laptop):
        _, errors = (process := running.start()).communicate(timeout=300)
        assert process.returncode == 1
        assert errors.startswith("error: run.name = 'deployed': ") and errors.count("\n") == 1
        assert "--resume" in errors and "--overwrite" in errors
    assert (small.server / "summary.json").read_bytes() == before
    assert not (laptop.here / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_overwrites_replaces_results_on_both_machines(small: Deployed) -> None:
    before = (small.server / "metrics.jsonl").read_bytes()
    small.finish(small.start("--overwrite"))
    check_results(small, rounds=1)
    assert (small.server / "metrics.jsonl").read_bytes() != before
    assert not list(small.server.glob(".before")) + list(small.here.glob(".before"))


def check_personalised(running: Deployed, folder: Path) -> None:
    """An unseen site's images get the experts and the answers that they got in the run."""
    run = open_run(running.server)
    assert run.summary["per_client_accuracy"]
    for client, accuracy in run.summary["per_client_accuracy"].items():
        images = running.sites / f"site{client}"
        made = personalise(run, images)
        assert list(made.card.experts) == run.summary["chosen"][client]
        made.save(folder / client)
        assert Personaliser.load(folder / client).predict(images).accuracy == accuracy


def test_an_unseen_site_is_personalised_as_in_the_run(small: Deployed, tmp_path: Path) -> None:
    check_personalised(small, tmp_path)
    with pytest.raises(FedjetsError, match="no models in it; those of a deployed run are in its folder on the server"):
        open_run(small.here)


def test_an_unregistered_key_is_refused(small: Deployed, tmp_path: Path) -> None:
    make_site_keys(tmp_path, [0])
    keys = Keys(tmp_path / "site-0", small.deployment.keys / "ca.crt")
    stranger = small.deployment.start_node("unregistered", {"client-id": 0}, keys)
    assert stranger.wait(timeout=60) != 0
    assert "2004" in small.deployment.log("unregistered").read_text()


def test_a_superlink_of_another_authority_is_refused(small: Deployed, tmp_path: Path) -> None:
    make_server_credentials(tmp_path, ["127.0.0.1"])
    keys = Keys(small.deployment.keys / "site-0", tmp_path / "ca.crt")
    stranger = small.deployment.start_node("distrusting", {"client-id": 0}, keys)
    log = small.deployment.log("distrusting")
    deadline = time.monotonic() + 60
    while "CERTIFICATE_VERIFY_FAILED" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    assert "SuperNode ID" not in log.read_text()
    kill_daemon(stranger)


@needs_another_user
def test_another_user_of_the_machine_reaches_no_daemon(small: Deployed) -> None:
    superlink, authority = f"127.0.0.1:{small.deployment.port}", str(small.deployment.keys / "ca.crt")
    assert int(run_as(0, LIST, superlink, authority).stdout) >= 1
    check_hung_up(run_as(NOBODY, LIST, superlink, authority))
    nodes = [found for found in listeners(descendants(os.getpid())) if "flower-supernode" in found.command]
    assert len(nodes) == len(small.deployment.sites)
    assert all(node.host.is_loopback for node in nodes)
    assert run_as(0, ASK, nodes[0].address, "POST /v1/runtime/acquire-task").stdout == "bytes 1\n"
    assert run_as(NOBODY, ASK, nodes[0].address, "POST /v1/runtime/acquire-task").stdout == "bytes 0\n"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_six_sites_and_two_unseen_ones_do_three_rounds(big: Deployed, tmp_path: Path) -> None:
    check_results(big, rounds=3)
    check_bytes(big, messages=2 * 8 + 3 * (1 + 6 + 2 * 2) + 2)
    summary = json.loads((big.server / "summary.json").read_text())
    assert set(summary["per_client_accuracy"]) == {"6", "7"}
    assert summary["embeddings_computed"] == 8
    check_personalised(big, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_killed_site_costs_its_own_work_and_a_killed_superlink_a_resume(big: Deployed, tmp_path: Path) -> None:
    unbroken = json.loads((big.server / "summary.json").read_text())
    with deployed(tmp_path, durable=True, **SIX_AND_TWO) as running:
        process = running.start()
        running.wait_for_round(1)
        running.deployment.kill_superlink()
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 1
        assert "does not answer" in errors and "--resume" in errors
        assert errors.count("\n") == 1
        running.deployment.start_superlink()
        summary = running.finish(running.start("--resume"))
        check_results(running, rounds=3)
        # Nothing but the resumed rounds was done anew, and they ended as if nobody had been killed.
        assert summary["embeddings_computed"] == 0
        assert summary["weights_hash"] == unbroken["weights_hash"]
        assert summary["accuracy"] == unbroken["accuracy"]

        process = running.start("-c", "run.name=bereft")
        here = running.here.with_name("bereft")
        bereft = replace(running, here=here, server=running.server.with_name("bereft"))
        bereft.wait_for_round(1)
        running.deployment.kill_site(5)
        summary = bereft.finish(process)
        failed = [record["failures"] for record in read_metrics(here)]
        assert failed[0] == {}
        assert set(failed[-1]) == {"5"}
        assert summary["status"] == "completed"
        assert summary["rounds"] == 3


def rehearse(folder: Path, **changes: Scalar) -> tuple[Path, str]:
    """Return the run folder of `fedjets deploy-local` with two sites and an unseen one, and what it printed."""
    settings = QUICK | ONE_EACH | {"run.output-dir": str(folder), "run.cache-dir": str(folder / "cache")}
    settings |= {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    (folder / "preset.toml").write_text(to_toml(settings))
    done = subprocess.run(
        [sys.executable, "-c", "from fedjets_flwr.cli.app import main; main()", "deploy-local", "--sites", "2",
         "--unseen", "1", "--config", str(folder / "preset.toml"), "--output-dir", str(folder)],
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "deployed", done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["local", "finetune", "specialist", "fedsr", "fedadg"])
def test_deploy_local_with_methods_whose_clients_have_models_of_their_own(name: str, tmp_path: Path) -> None:
    """Every site makes its own model and tells how it does; what it keeps lies in its own cache, gone with it."""
    run, _ = rehearse(
        tmp_path, strategy__name=name, run__rounds=2, moe__trainable="all", partition__val_share=0.25,
        partition__test_share=0.25, adapt__max_epochs=5,
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["failures"] == 0
    assert set(summary["participants"]["clients"]) == {"0", "1"}
    assert (summary["accuracy"] is None) == (name == "local")
    assert ("specialist-share" in summary["participants"]) == (name == "specialist")
    assert (summary["bytes_up"] == 0) == (name == "local")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_deploy_local_rehearses_all_of_it(tmp_path: Path) -> None:
    run, printed = rehearse(tmp_path)
    assert "round 1/1" in printed
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert {path.name for path in (run / "logs").iterdir()} == {
        "superlink.log", "site0.log", "site1.log", "site2.log"
    }  # fmt: skip
    assert {path.name for path in (run / "sites").iterdir()} == {"site0", "site1", "site2"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_deploy_local_with_sites_that_have_text_of_their_own(tmp_path: Path) -> None:
    """The server has no text: what a site reads text by came with the model."""
    write_domains(tmp_path / "texts")
    run, printed = rehearse(
        tmp_path, **TEXT_SIZE | {"text.tokens": "bpe", "text.vocabulary": 300, "data.dir": str(tmp_path / "texts")},
        strategy__name="fedmoe", run__rounds=2, moe__trainable="all", text__domains="sums,tales",
        cohort__normals=1,
    )  # fmt: skip
    summary, config = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    assert summary["status"] == "completed" and summary["failures"] == 0
    assert set(summary["experts_held"]) == {"0", "1"}
    assert set(summary["participants"]["domains"]) == {"sums", "tales"}
    assert (config["data.name"], config["data.dir"], config["partition.public-share"]) == ("text-folder", "", 1)
    assert {path.name for path in (run / "sites").iterdir()} == {"site0.jsonl", "site1.jsonl", "site2.jsonl"}
    texts = [(run / "sites" / f"site{client}.jsonl").read_text() for client in range(3)]
    assert " the " in texts[1] and " the " not in texts[0] + texts[2]
    assert "--text" in printed
    made = personalise_text(open_language_run(run), run / "sites" / "site2.jsonl")
    assert made.card.held == initial_sets(made.card.activation, 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupt_stops_the_run_on_the_superlink(small: Deployed) -> None:
    here = small.here.with_name("stopped")
    process = small.start("-c", "run.name=stopped", "-c", "run.rounds=1000", "-c", "run.evaluate-every=1000")
    replace(small, here=here).wait_for_round(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert small.flower_facts()["status"] == "finished:stopped"
