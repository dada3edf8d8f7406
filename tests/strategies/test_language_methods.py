"""Methods that know nothing of text, on a language model: they learn, and give the same bits each time."""

import json

import pytest
import torch

import server_app.app
from fedjets_flwr.data.text import open_text
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.transformer import sizes_of
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.in_process import Finished
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
    told = server_app.app.request_facts
    monkeypatch.setattr(server_app.app, "request_facts", lambda method: told(method) | {"samples": "another"})
    with pytest.raises(FedjetsError, match="the text here is not the server's"):
        text_run("fedavg", run__rounds=1)


def test_clients_that_share_their_text_look_at_the_model_they_share(text_run: TextRun) -> None:
    found = text_run("fedavg", run__rounds=3, early_stopping__check_every=1, partition__opt_out=0.34)
    assert "best" in found.vectors
