"""Runs whose sites have text of their own, in this process: a node each, and no text at the server but public text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from flwr.app import Message, MetricRecord
from rich.console import Console

from client_app.node import read_node
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.text import open_text
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.local_deployment import rehearse
from fedjets_flwr.models.common_expert import load_common_expert
from fedjets_flwr.models.pretraining import named_common_expert, pretrain, save_common_expert
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.tasks import open_task
from tests.support.in_process import Finished
from tests.support.sites import SiteGrid
from tests.support.tasks import task_folder, task_settings
from tests.support.text import DOMAINS, Settings, TextRun, text_folder, text_run, text_settings

__all__ = ["task_folder", "task_settings", "text_folder", "text_run", "text_settings"]

ELSEWHERE: dict[str, Scalar] = {"partition__public_share": 1, "text__tokens": "bpe", "text__vocabulary": 300}


@pytest.fixture
def own(text_folder: Path, tmp_path: Path) -> dict[int, dict[str, Scalar]]:
    """Return what sites say of their text, which the server has not: one of them a file, the other two folders."""
    found: dict[int, dict[str, Scalar]] = {}
    for client, domain in enumerate((*DOMAINS, DOMAINS[0])):
        place = tmp_path / "sites" / f"site{client}"
        place.mkdir(parents=True)
        texts = {p.name: p.read_text().replace("king", "queen") for p in sorted((text_folder / domain).iterdir())}
        if client == 1:
            place = place / "own.jsonl"
            place.write_text("".join(json.dumps({"name": n, "text": text}) + "\n" for n, text in texts.items()))
        else:
            for name, text in texts.items():
                (place / name).write_text(text)
        found[client] = {"data-path": str(place), "domain": domain}
    return found


class OwnText(SiteGrid):
    """Sites that say where their text lies."""

    own: ClassVar[dict[int, dict[str, Scalar]]]
    told: ClassVar[list[MetricRecord]]

    def change(self, reply: Message) -> Message:
        if reply.has_content():
            OwnText.told += reply.content.metric_records.values()
        return super().change(reply)

    def begin(self) -> None:
        OwnText.told = []
        for node, site in self.sites.items():
            site.config |= self.own[node - 100]


@pytest.fixture
def run(text_run: TextRun, own: dict[int, dict[str, Scalar]], monkeypatch: pytest.MonkeyPatch) -> TextRun:
    """Return what does runs of sites with text of their own."""
    monkeypatch.setattr(OwnText, "own", own, raising=False)

    def start(name: str, /, **changes: Scalar) -> Finished:
        return text_run(name, OwnText, **ELSEWHERE | changes)

    return start


def summary_of(finished: Finished) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished.config.run_dir / "summary.json").read_text())
    return found


def test_fedmoe_over_sites_with_text_of_their_own(run: TextRun, own: dict[int, dict[str, Scalar]]) -> None:
    finished = run("fedmoe")
    told = summary_of(finished)
    assert told["status"] == "completed"
    assert told["failures"] == 0
    assert set(told["experts_held"]) == {"0", "1", "2"}
    assert finished.strategy.domains == {0: 0, 1: 1, 2: 2}  # type: ignore[attr-defined]
    assert set(told["participants"]["domains"]) == set(DOMAINS)
    assert all(0 < bits < 8 for bits in told["participants"]["bits"].values())
    # What sites must have alike is the tokeniser, and no text.
    public = open_text(finished.config)
    assert told["samples_digest"] != public.digest
    common = load_common_expert(finished.config.run_dir / "common-expert.safetensors")
    assert common.tokeniser == public.tokeniser != ""
    # Text leaves no site: these numbers and vectors are all that clients tell, and no number of them is of each token.
    numbers = {name for record in OwnText.told for name in record}
    assert numbers == {
        "activation", "used", "loss", "score", "num-examples", "domain", "local", "bits-per-byte", "computed",
        "labelled",
    }  # fmt: skip
    sizes = [len(value) for record in OwnText.told for value in record.values() if isinstance(value, list)]
    assert max(sizes) == 2 * 4  # layers and experts
    # Seven hundred tokens in windows of 32, each with one to foretell.
    assert {kept for client, kept in finished.num_samples.items() if client < 3} == {(700 - 1) // 32}


def test_a_server_without_any_text_and_a_model_that_brings_its_tokeniser(
    run: TextRun, text_settings: Settings, tmp_path: Path
) -> None:
    config = text_settings(**ELSEWHERE)
    save_common_expert(pretrain(config, lambda text: None), tmp_path / "model.safetensors")
    given: dict[str, Scalar] = {"common_expert__path": str(tmp_path / "model.safetensors")}
    bare = run("fedavg", **given, data__dir=str(tmp_path / "nothing"))
    known = run("fedavg", **given)
    assert summary_of(bare)["weights_hash"] == summary_of(known)["weights_hash"]
    assert summary_of(bare)["failures"] == 0


def test_bytes_need_no_tokeniser(run: TextRun) -> None:
    told = summary_of(run("randommoe", text__tokens="bytes"))
    assert (told["status"], told["failures"]) == ("completed", 0)


def test_a_policy_keeps_what_a_text_is_like_at_its_site(
    run: TextRun, own: dict[int, dict[str, Scalar]], tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text('may-leave = ["loss", "own-tests"]\n')
    own[2]["policy"] = str(tmp_path / "policy.toml")
    finished = run("fedmoe")
    told = summary_of(finished)
    assert told["status"] == "completed"
    assert set(told["experts_held"]) == {"0", "1"}
    assert set(told["participants"]["clients"]) == {"0", "1"}
    reasons = [reason for record in read_metrics(finished.config.run_dir) for reason in record["failures"].values()]
    assert any("refused by its policy: may-leave has no" in reason for reason in reasons)


def test_a_site_that_names_no_text_is_told_what_to_give(
    run: TextRun, own: dict[int, dict[str, Scalar]], caplog: pytest.LogCaptureFixture
) -> None:
    del own[1]["data-path"]
    finished = run("fedavg")
    assert set(finished.num_samples) == {0, 2}
    assert "every client is a site with text of its own; give data-path in --node-config" in caplog.text


def test_a_file_that_lacks_its_tokeniser_is_refused(text_settings: Settings, run: TextRun, tmp_path: Path) -> None:
    made = pretrain(text_settings(**ELSEWHERE), lambda text: None)
    save_common_expert(replace(made, tokeniser=""), tmp_path / "model.safetensors")
    with pytest.raises(FedjetsError, match=r"common-expert\.path = .*: tells no tokeniser, which sites need"):
        run("fedavg", common_expert__path=str(tmp_path / "model.safetensors"))


def test_a_rehearsal_makes_the_sites_files_of_text_that_is_here(
    text_settings: Settings, task_settings: Settings
) -> None:
    for config, said in (
        (
            text_settings(**ELSEWHERE),
            "partition.public-share = 1: a rehearsal makes the sites' files itself; set it to 0",
        ),
        (task_settings(), "data.name = 'task-folder': a rehearsal is of images or of text"),
    ):
        with pytest.raises(FedjetsError, match=said):
            rehearse(config, Console(quiet=True))


@pytest.mark.parametrize(
    ("facts", "changes", "said"),
    [
        ({"domain": "cookery"}, {}, "domain='cookery': none of text.domains; .* of sums, tales, code"),
        ({}, {}, "domain='': none of text.domains"),
        ({"domain": "sums"}, {"partition__public_share": 0}, "domain is for a site's own text"),
        (
            {"data-path": "a"},
            {"partition__public_share": 0},
            "data-path is for data.name = 'image-folder', or for text",
        ),
    ],
)
def test_a_wrong_node_config_is_named(
    facts: dict[str, Scalar], changes: dict[str, Scalar], said: str, text_settings: Settings
) -> None:
    config = text_settings(**ELSEWHERE | changes)
    with pytest.raises(FedjetsError, match=said) as caught:
        read_node({"client-id": 1} | facts, config, simulated=False)
    assert "\n" not in str(caught.value)


def test_a_lone_domain_need_not_be_named(text_settings: Settings) -> None:
    config = text_settings(**ELSEWHERE, text__domains="tales")
    node = read_node({"client-id": 1, "data-path": "a"}, config, simulated=False)
    assert (node.domain, node.samples) == ("tales", Path("a"))


def test_all_text_at_the_server_is_public_where_sites_have_their_own(text_settings: Settings) -> None:
    shared, elsewhere = (open_text(text_settings(partition__public_share=share)) for share in (0, 1))
    assert len(elsewhere.public) + len(elsewhere.public_held_out) > 1.7 * (
        len(shared.public) + len(shared.public_held_out)
    )
    assert elsewhere.digest == shared.digest
    task = open_task(text_settings(partition__public_share=1))
    assert not task.simulates
    with pytest.raises(FedjetsError, match="every client is a site with text of its own; give data-path"):
        task.samples(0)


def test_a_share_that_is_neither_nothing_nor_all_is_refused(text_settings: Settings) -> None:
    with pytest.raises(FedjetsError, match=r"partition\.public-share = 0\.2: some text is public anyway"):
        text_settings(partition__public_share=0.2)


def test_a_model_tells_its_tokeniser_in_its_file(text_settings: Settings, tmp_path: Path) -> None:
    made = pretrain(text_settings(**ELSEWHERE), lambda text: None)
    save_common_expert(made, tmp_path / "a.safetensors")
    again = load_common_expert(tmp_path / "a.safetensors")
    assert again.tokeniser == made.tokeniser
    assert again.digest == made.digest != replace(made, tokeniser="").digest
    save_common_expert(replace(made, tokeniser=made.tokeniser[:-2]), tmp_path / "b.safetensors")
    with pytest.raises(FedjetsError, match="not a common expert .a tokeniser that cannot be read") as caught:
        load_common_expert(tmp_path / "b.safetensors")
    assert "\n" not in str(caught.value)


def test_a_model_for_other_tokens_of_the_same_number_is_refused(text_settings: Settings, tmp_path: Path) -> None:
    """Simulations, where the text tells the tokens."""
    config: Config = text_settings(text__tokens="bpe", text__vocabulary=300)
    made = pretrain(config, lambda text: None)
    told = json.loads(made.tokeniser)
    told["merges"] = told["merges"][:-1]
    save_common_expert(replace(made, tokeniser=json.dumps(told)), tmp_path / "a.safetensors")
    path: dict[str, Scalar] = {"common_expert__path": str(tmp_path / "a.safetensors")}
    with pytest.raises(FedjetsError, match="made for other tokens than those of the text"):
        named_common_expert(text_settings(text__tokens="bpe", text__vocabulary=300, **path))
