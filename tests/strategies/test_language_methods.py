"""Methods that know nothing of text, on a language model: they learn, and give the same bits each time."""

import json
from typing import Any

import pytest
import torch

import server_app.app
from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.text import open_text
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.transformer import sizes_of
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from server_app.start import request_facts
from tests.support.in_process import Finished, InProcessGrid
from tests.support.text import Settings, TextRun, text_folder, text_run, text_settings

__all__ = ["text_folder", "text_run", "text_settings"]


def bits(run: Finished) -> list[float]:
    """Bits per byte on clients' own tests, round by round."""
    return [record["participants"]["bits_per_byte"] for record in read_metrics(run.config.run_dir)]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedavg", {}), ("fedprox", {"fedprox__mu": 0.1}), ("finetune", {}),
        ("scaffold", {"train__optimizer": "sgd", "train__lr": 0.3}),
    ],
)  # fmt: skip
def test_bits_per_byte_fall_and_are_the_score(method: str, changes: dict[str, object], text_run: TextRun) -> None:
    done = text_run(method, run__rounds=4, **changes)
    course = bits(done)
    assert course[-1] < course[0]
    results = read_recorded(done.config.run_dir).results
    assert results["score"]["name"] == "bits per byte on clients' own tests"
    assert results["score"]["value"] == course[-1]
    assert results["score"]["best"] == min(course)
    own = results["participants"]
    assert own["bits_per_byte"] == pytest.approx(sum(own["bits"].values()) / 3)
    assert set(own["domains"]) == {"sums", "tales", "code"}
    assert own["domains"]["tales"]["bits_per_byte"] == own["bits"]["1"]
    right, total = own["clients"]["1"]["local"]
    assert own["domains"]["tales"]["accuracy"] == right / total
    assert results["accuracy"] is None


def test_the_whole_model_moves_as_one_vector(text_run: TextRun) -> None:
    done = text_run("fedavg", run__rounds=1)
    floats = sizes_of(done.strategy.architecture(0)).of(2 * 4)
    assert len(done.vectors["expert.0"]) == floats
    (record,) = read_metrics(done.config.run_dir)
    assert (record["bytes_down"], record["bytes_up"]) == (3 * 4 * floats, 3 * 4 * floats)
    told = json.loads((done.config.run_dir / "summary.json").read_text())
    assert told["trained_parameters"] == floats
    assert told["kinds"] == ["sums", "tales", "code"]
    assert told["flops_per_answer"] > 0
    assert told["context"] == 32 and "image_shape" not in told
    assert told["bytes_setup"] == 3 * len(done.strategy.common.as_bytes)


def test_a_client_alone_starts_from_the_language_model_and_sends_nothing(text_run: TextRun) -> None:
    alone, untouched = (text_run("local", run__rounds=1, adapt__max_epochs=epochs) for epochs in (3, 0))
    (record,) = read_metrics(alone.config.run_dir)
    assert record["bytes_down"] == record["bytes_up"] == record["bytes_served"] == 0
    assert bits(alone)[0] < bits(untouched)[0]
    random = text_run("local", run__rounds=1, adapt__max_epochs=0, adapt__start="random")
    assert bits(random)[0] > bits(untouched)[0]


def test_without_a_round_s_training_all_is_as_it_began(text_run: TextRun) -> None:
    once, twice = (text_run("fedavg", run__seed=seed, train__lr=1e-30) for seed in (1, 2))
    assert torch.allclose(once.vectors["expert.0"], twice.vectors["expert.0"])


@pytest.mark.parametrize("method", ["fedjets", "fedmix", "ifca", "fedsr", "fedadg", "specialist", "ensembles"])
def test_methods_of_images_alone_say_so(method: str, text_run: TextRun) -> None:
    with pytest.raises(FedjetsError, match=f"data.name = 'text-folder': strategy.name = '{method}' learns images"):
        text_run(method)


def test_a_language_model_of_one_s_own_is_taken_and_checked(text_run: TextRun, text_settings: Settings) -> None:
    first = text_run("fedavg", run__rounds=1)
    path = str(first.config.run_dir / "common-expert.safetensors")
    second = text_run("fedavg", run__rounds=1, common_expert__path=path, language_model__pretrain_steps=1)
    assert torch.equal(first.vectors["expert.0"], second.vectors["expert.0"])
    for changes, reason in (
        ({"language_model__context": 16}, "reads 32 tokens at once; set language-model.context to that, it is 16"),
        ({"text__tokens": "bpe", "text__vocabulary": 300}, "made for 256 tokens, but the text has"),
    ):
        with pytest.raises(FedjetsError, match=reason):
            text_run("fedavg", common_expert__path=path, **changes)


def test_the_text_is_told_and_a_site_with_another_is_refused(
    text_run: TextRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = text_run("fedavg", run__rounds=1)
    digest = open_text(found.config).digest
    assert len(digest) > 20
    assert json.loads((found.config.run_dir / "summary.json").read_text())["samples_digest"] == digest
    monkeypatch.setattr(server_app.app, "request_facts", lambda method: request_facts(method) | {"samples": "another"})
    with pytest.raises(FedjetsError, match="the text here is not the server's"):
        text_run("fedavg", run__rounds=1)


def test_clients_that_share_their_text_look_at_the_model_they_share(text_run: TextRun) -> None:
    found = text_run("fedavg", run__rounds=3, early_stopping__check_every=1, partition__opt_out=0.34)
    assert "best" in found.vectors


ALONE = {"partition__clients": 1, "cohort__normals": 0}
"""One client, which is the anchor: an average over clients is its model."""


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_tuned_model_is_what_a_first_round_makes_of_it(schedule: str, text_run: TextRun) -> None:
    changes = ALONE | {"train__schedule": schedule}
    before = text_run("fedavg", run__rounds=0, participants__tuned=True, **changes)
    (record,) = read_metrics(before.config.run_dir)
    assert record["round"] == 0
    assert record["participants"]["tuned_bits_per_byte"] < record["participants"]["bits_per_byte"]
    assert [record["participants"]["tuned_bits_per_byte"]] == bits(text_run("fedavg", run__rounds=1, **changes))


@pytest.mark.parametrize("method", ["fedavg", "fedmoe", "local"])
def test_models_are_tuned_after_the_last_round_alone_and_stay_as_they_were(method: str, text_run: TextRun) -> None:
    plain, tuned = (text_run(method, run__rounds=2, participants__tuned=told) for told in (False, True))
    assert bits(plain) == bits(tuned)
    first, last = (record["participants"] for record in read_metrics(tuned.config.run_dir))
    assert "tuned_bits_per_byte" not in first
    assert last["tuned_bits_per_byte"] != last["bits_per_byte"]
    assert all("tuned_bits_per_byte" not in r["participants"] for r in read_metrics(plain.config.run_dir))


@pytest.mark.parametrize("lie", [-0.1, 1e200, None])
def test_a_tuned_score_that_is_none_is_refused(lie: float | None, text_run: TextRun) -> None:
    class Lies(InProcessGrid):
        def change(self, reply: Any) -> Any:
            for name, numbers in reply.content.metric_records.items():
                if "tuned-bits-per-byte" in numbers and name == "client.1":
                    del numbers["tuned-bits-per-byte"]
                    if lie is not None:
                        numbers["tuned-bits-per-byte"] = lie
            return reply

    done = text_run("fedavg", Lies, run__rounds=1, participants__tuned=True)
    (record,) = read_metrics(done.config.run_dir)
    assert set(record["participants"]["clients"]) == {"0", "2"}
    assert "tuned-bits-per-byte" in record["failures"]["1"]


def test_images_have_no_tuned_score() -> None:
    with pytest.raises(FedjetsError, match="participants.tuned = true: only of text"):
        Config.from_flat({"participants.tuned": True})


def test_a_round_may_have_a_client_of_each_domain(text_run: TextRun) -> None:
    done = text_run("fedmoe", cohort__sampling="one-per-domain", partition__clients=6, text__train_tokens=300)
    for record in read_metrics(done.config.run_dir):
        assert sorted(client % 3 for client in record["cohort"]) == [0, 1, 2]
