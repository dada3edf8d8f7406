"""A language model for a text that no run has seen: which experts it gets, what they tell, and what a bundle holds."""

import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from fedjets_flwr.data.text_site import encode_site, part_of
from fedjets_flwr.data.text_sources import Document
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models import switch
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.transformer import LanguageArchitecture, Transformer, members, sizes_of, transformer_of
from fedjets_flwr.moe.structure import count, initial_sets, random_sets_like
from fedjets_flwr.personalize.language import (
    LanguagePersonaliser,
    activation_of,
    bits_per_byte,
    model_of,
    personalise_text,
    told_bits,
)
from fedjets_flwr.runs.trained_language_run import LanguageRun, open_language_run
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.seeds import numpy_generator
from tests.support.personal import call, finish
from tests.support.tasks import task_folder, task_settings
from tests.support.text import DOMAINS, Settings, finish_text, write_domains

__all__ = ["task_folder", "task_settings"]

SMALL = LanguageArchitecture(256, 8, 8, 2, 2, 2, 4, 16)
PAIRS = {"text__tokens": "bpe", "text__vocabulary": 300}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LanguageRun:
    """FedMoE on byte pairs, from a model that was pretrained for long enough to know the domains."""
    return open_language_run(
        finish_text(
            tmp_path_factory,
            strategy__name="fedmoe",
            language_model__pretrain_steps=250,
            text__train_tokens=1500,
            **PAIRS,
        )
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other texts of the same domains."""
    folder = tmp_path_factory.mktemp("new")
    write_domains(folder, seed=2)
    return folder


@pytest.fixture(scope="module")
def made(run: LanguageRun, texts: Path) -> LanguagePersonaliser:
    return personalise_text(run, texts / "tales", 0.5)


@pytest.fixture
def bundle(made: LanguagePersonaliser, tmp_path: Path) -> Path:
    made.save(tmp_path / "bundle")
    return tmp_path / "bundle"


# In closed form ------------------------------------------------------------------------------------------------------


def small(seed: int = 0) -> Transformer:
    return transformer_of(build(SMALL, seed).eval().requires_grad_(False))


def test_an_activation_is_the_share_of_tokens_of_each_expert() -> None:
    """The normalised input of the experts is one vector everywhere, and expert 2 has it as its row."""
    model = small()
    for block in model.blocks:
        block.second.weight.zero_()
        block.second.bias.fill_(1.0)
    for layer, m in members(SMALL.sets):
        model.held(layer)[m].row.fill_(1.0 if m == 2 else 0.5)
    assert activation_of(model, torch.arange(21)) == ((0, 0, 1, 0), (0, 0, 1, 0))
    model.held(1)[2].row.fill_(-1.0)
    assert activation_of(model, torch.arange(21)) == ((0, 0, 1, 0), (1, 0, 0, 0))


@given(length=some.integers(2, 40), seed=some.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_every_token_but_the_first_counts_once(length: int, seed: int) -> None:
    """Windows of eight tokens, the last one shorter."""
    model, tokens = small(seed), torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))
    counted = [share * (length - 1) for row in activation_of(model, tokens) for share in row]
    assert counted == pytest.approx([round(n) for n in counted])
    assert sum(counted) == pytest.approx(2 * (length - 1))
    nats = 0.0
    for start in range(0, length - 1, 8):
        window = tokens[start : start + 9]
        log_probs = model(window[None, :-1])[0].log_softmax(1)
        nats -= float(log_probs.gather(1, window[1:, None]).sum())
    bits, num_bytes = told_bits(model, tokens, torch.full((256,), 3))
    assert bits == pytest.approx(nats / math.log(2), rel=1e-5)
    assert num_bytes == 3 * (length - 1)


def test_who_knows_nothing_needs_eight_bits_a_byte() -> None:
    model = small()
    model.embedding.zero_()
    assert bits_per_byte(model, torch.arange(30), torch.ones(256, dtype=torch.int64)) == pytest.approx(8)


@given(sets=some.tuples(*[some.sets(some.integers(0, 3), min_size=1)] * 2))
@settings(max_examples=20, deadline=None)
def test_the_model_is_the_whole_one_with_the_other_routers_at_minus_infinity(
    run: LanguageRun, sets: tuple[set[int], set[int]]
) -> None:
    held = tuple(tuple(sorted(ids)) for ids in sets)
    part, full = model_of(run, held), model_of(run, run.architecture.sets)
    tokens = torch.arange(2 * 32).view(2, 32) % run.architecture.vocabulary
    layers = iter(held)

    def masked(h: Tensor, rows: Tensor) -> Tensor:
        mask = torch.full((len(rows),), -math.inf)
        mask[list(next(layers))] = 0.0
        return (h @ rows.t() + mask).softmax(dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switch, "gates", masked)
        expected = full(tokens)
    torch.testing.assert_close(part(tokens), expected, rtol=1e-4, atol=1e-5)


# On a run ------------------------------------------------------------------------------------------------------------


def test_the_text_s_own_experts_are_chosen_and_nothing_else_changes(
    run: LanguageRun, made: LanguagePersonaliser
) -> None:
    card = made.card
    assert card.held == initial_sets(card.activation, 4)
    assert card.architecture == replace(run.architecture, held=card.held)
    assert (card.bytes_held, card.bytes_whole) == tuple(
        4 * sizes_of(run.architecture).of(n) for n in (count(card.held), 8)
    )
    full = model_of(run, run.architecture.sets)
    own, theirs = made.model.state_dict(), full.state_dict()
    assert set(own) < set(theirs)
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert not any(domain in card.model_dump_json() for domain in DOMAINS)


def test_chosen_experts_tell_a_known_domain_better_than_drawn_ones(run: LanguageRun, texts: Path) -> None:
    """The mean over many draws; with all experts a little better still, or much the same."""
    for domain in DOMAINS:
        made = personalise_text(run, texts / domain, 0.5)
        site = encode_site(texts / domain, made.tokens)
        scoring = site.stream(300, torch.Generator().manual_seed(0), "test")
        drawn = [
            bits_per_byte(
                model_of(run, random_sets_like(made.card.held, 4, numpy_generator(seed, "test"))), scoring, site.lengths
            )
            for seed in range(12)
        ]
        chosen = bits_per_byte(made.model, scoring, site.lengths)
        assert chosen < sum(drawn) / len(drawn)
        assert chosen < 1.1 * bits_per_byte(model_of(run, run.architecture.sets), scoring, site.lengths)


def test_the_whole_memory_is_the_wholemodel_of(run: LanguageRun, texts: Path) -> None:
    card = personalise_text(run, texts / "sums", 1.0).card
    assert card.held == run.architecture.sets
    assert card.bits_per_byte.chosen == card.bits_per_byte.random == card.bits_per_byte.whole
    assert card.bytes_held == card.bytes_whole


def test_what_scores_did_not_choose(run: LanguageRun, texts: Path, tmp_path: Path) -> None:
    """Documents of the test part may be any others: the experts stay."""
    (tmp_path / "tales").mkdir()
    for path in (texts / "tales").iterdir():
        scores = part_of(Document(path.name, "")) == "test"
        (tmp_path / "tales" / path.name).write_text("#" * 50 if scores else path.read_text())
    one, other = (personalise_text(run, folder / "tales", 0.5).card for folder in (texts, tmp_path))
    assert one.activation == other.activation
    assert one.bits_per_byte.chosen < other.bits_per_byte.chosen


def test_methods_of_one_whole_model_are_as_good(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> None:
    """FedAvg keeps it as its only expert; bytes need no tokeniser."""
    other = open_language_run(finish_text(tmp_path_factory, strategy__name="fedavg", run__rounds=1))
    made = personalise_text(other, texts / "code", 0.25)
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    made.save(folder)
    assert {path.name for path in folder.iterdir()} == {"card.json", "model.safetensors"}
    assert made.card.held == initial_sets(made.card.activation, 2)
    found = LanguagePersonaliser.load(folder).score(texts / "code" / "7.txt").files
    assert [(f.file, f.tokens, f.num_bytes) for f in found] == [
        ("7.txt", n := (texts / "code" / "7.txt").stat().st_size - 1, n)
    ]


# A bundle ------------------------------------------------------------------------------------------------------------


def test_a_bundle_scores_as_the_model_that_was_saved(made: LanguagePersonaliser, bundle: Path, texts: Path) -> None:
    again = LanguagePersonaliser.load(bundle)
    assert again.card == made.card.model_copy(update={"sha256": again.card.sha256})
    assert {path.name for path in bundle.iterdir()} == {"card.json", "model.safetensors", "tokeniser.json"}
    found, wanted = again.score(texts / "tales"), made.score(texts / "tales")
    assert found == wanted
    assert len(found.files) == 80
    assert found.bits_per_byte is not None
    assert found.bits_per_byte == pytest.approx(made.card.bits_per_byte.chosen, rel=0.2)
    one = (texts / "tales" / "7.txt").read_text()
    (tokens,) = again.tokens.encode([one])
    (score,) = again.score(texts / "tales" / "7.txt").files
    assert score.tokens == len(tokens) - 1
    assert score.bits_per_byte == bits_per_byte(again.model, tokens.long(), again.tokens.lengths)


def test_scores_are_a_table_that_nothing_computes(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"name": "=1+1", "text": "the king went"}\n{"name": "b", "text": ""}\n')
    scores = LanguagePersonaliser.load(bundle).score(tmp_path / "lines.jsonl")
    rows = list(csv.reader(io.StringIO(scores.csv().decode())))
    assert rows[0] == ["file", "tokens", "bytes", "bits_per_byte"]
    assert rows[1][0] == "'=1+1" and float(rows[1][3]) > 0
    assert rows[2] == ["b", "0", "0", ""]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format="other"), "format: "),
        (lambda c: c.update(more=1), "more: "),
        (lambda c: c.update(held=[]), "held: no experts"),
        (lambda c: c.update(held=[[0], [9]]), "held experts that are not ascending ids"),
        (lambda c: c.update(held=[[1, 0], [0]]), "held experts that are not ascending ids"),
        (lambda c: c.update(activation=[[1.0]]), "activation: not a share for each expert"),
        (lambda c: c["sizes"].update(heads=3), "heads must divide the width"),
        (lambda c: c["sizes"].update(layers=2**30), "a size that is not from 1 to"),
        (lambda c: c["sizes"].update(hidden=2**19), "not the weights of this model"),
        (lambda c: c["sizes"].update(vocabulary=301), "not the weights of this model"),
        (lambda c: c["sha256"].update({"../model.safetensors": "0" * 64}), "sha256: not the files"),
        (lambda c: c["sha256"].update({"model.safetensors": "0" * 64}), "altered or damaged"),
        (lambda c: c.update(tokens="bytes"), "sha256: not the files"),
        (lambda c: c["bits_per_byte"].update(chosen=-1), "bits_per_byte.chosen: "),
    ],
)  # fmt: skip
def test_a_card_that_lies_is_one_line(change: Change, said: str, bundle: Path) -> None:
    card = json.loads((bundle / "card.json").read_text())
    change(card)
    (bundle / "card.json").write_text(json.dumps(card))
    with pytest.raises(FedjetsError, match=said) as caught:
        LanguagePersonaliser.load(bundle)
    assert "\n" not in str(caught.value)


def forged(bundle: Path, name: str, data: bytes) -> None:
    """Put a file in the place of one, and a card beside it that fits."""
    (bundle / name).write_bytes(data)
    card = json.loads((bundle / "card.json").read_text())
    card["sha256"][name] = hashlib.sha256(data).hexdigest()
    (bundle / "card.json").write_text(json.dumps(card))


def test_forged_files_are_one_line(bundle: Path) -> None:
    weights = safetensors.torch.load_file(bundle / "model.safetensors")
    for name, data, said in (
        ("tokeniser.json", b"{", r"tokeniser\.json: not the tokeniser of this model .a tokeniser that cannot be read"),
        ("tokeniser.json", b"", "not the tokeniser of this model .of 256 tokens, not 300"),
        ("tokeniser.json", b"\xff", "not the tokeniser of this model"),
        ("model.safetensors", b"no", "not the weights of this model"),
        ("model.safetensors", safetensors.torch.save({"a": torch.zeros(1)}), "not the weights of this model"),
        ("model.safetensors", safetensors.torch.save({n: t / 0 for n, t in weights.items()}), "not finite"),
    ):  # fmt: skip
        before = (bundle / name).read_bytes()
        forged(bundle, name, data)
        with pytest.raises(FedjetsError, match=said) as caught:
            LanguagePersonaliser.load(bundle)
        assert "\n" not in str(caught.value)
        forged(bundle, name, before)
    assert LanguagePersonaliser.load(bundle)
    (bundle / "tokeniser.json").unlink()
    with pytest.raises(FedjetsError, match=r"tokeniser\.json: missing"):
        LanguagePersonaliser.load(bundle)


def test_a_run_whose_files_do_not_fit_is_one_line(run: LanguageRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (newest, *others) = sorted((folder / "checkpoints").glob("*.safetensors"), reverse=True)
    for path in others:
        path.unlink()
    vectors = safetensors.torch.load(newest.read_bytes())
    data = safetensors.torch.save({name: v for name, v in vectors.items() if name != "expert.1.3"})
    digest = hashlib.sha256(newest.read_bytes()).hexdigest()
    newest.unlink()
    newest.with_name(newest.name.replace(digest, hashlib.sha256(data).hexdigest())).write_bytes(data)
    with pytest.raises(FedjetsError, match="damaged: its newest checkpoint does not hold the model"):
        open_language_run(folder)


# The command line ----------------------------------------------------------------------------------------------------


def test_the_commands_make_a_bundle_and_score_text(
    run: LanguageRun, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    asked = ("personalize", "--run", run.folder, "--text", texts / "sums", "--memory", "0.5", "--output", folder)
    assert call(monkeypatch, *asked) == 0
    printed = capsys.readouterr().out
    card = LanguagePersonaliser.load(folder).card
    assert f"{count(card.held)} of 8 experts for" in printed
    assert (
        f"weights: {card.bytes_held} bytes, {card.bytes_held / card.bytes_whole:.0%} of {card.bytes_whole}" in printed
    )
    bits = card.bits_per_byte
    for value, what in ((bits.chosen, "with these"), (bits.random, "with as many drawn"), (bits.whole, "with all")):
        assert f"{value:.4f} {what}" in " ".join(printed.split())
    assert call(monkeypatch, "predict", folder, texts / "sums", "--output", tmp_path / "scores.csv") == 0
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 81
    assert "bits per byte of 80 documents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run", "RUN"], "give --images FOLDER, or --text FOLDER"),
        (["--run", "RUN", "--text", "TEXT", "--images", "TEXT"], "give --images FOLDER, or --text FOLDER"),
        (["--run", "RUN", "--text", "TEXT", "--experts", "2"], "--text: not with --experts"),
        (["--run", "RUN", "--text", "TEXT", "--memory", "0.01"], "--memory 0.01: give a share of all experts, from "),
        (["--run", "RUN", "--text", "TEXT", "--memory", "nan"], "--memory nan: give a share of all experts"),
        (["--run", "RUN", "--text", "TEXT", "--memory", "1.5"], "--memory 1.5: give a share of all experts"),
        (["--run", "RUN", "--text", "absent"], "absent: neither a folder of .txt files"),
        (["--run", "RUN", "--images", "TEXT"], "a run of language models; `fedjets personalize --text`"),
        (["--run", "RUN", "--images", "TEXT", "--memory", "1"], "--memory: only with --text"),
        (["--run", "absent", "--text", "TEXT"], "config.json is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    options: list[str], said: str, run: LanguageRun, texts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    known = {"RUN": run.folder, "TEXT": texts / "sums"}
    assert call(monkeypatch, "personalize", *[known.get(option, option) for option in options]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and said in errors and errors.count("\n") == 1
    assert not (tmp_path / "bundles").exists()


def test_a_bundle_of_text_is_no_model_of_images(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "export", bundle, "--onnx", tmp_path / "a.onnx") == 1
    assert "a language model for a text, not a model of images" in capsys.readouterr().err


def test_a_run_on_tasks_is_refused(task_settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(task_settings().flat()))
    with pytest.raises(
        FedjetsError, match="data.name = 'task-folder': a run on tasks; a text gets experts of one on text"
    ):
        open_language_run(tmp_path)


def test_runs_on_images_and_runs_that_keep_no_model_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(FedjetsError, match="a run on images; give --images instead"):
        open_language_run(finish(tmp_path_factory).folder)
    alone = finish_text(tmp_path_factory, strategy__name="local", run__rounds=1)
    with pytest.raises(FedjetsError, match="strategy.name = 'local' keeps no model at the server"):
        open_language_run(alone)
    with pytest.raises(FedjetsError, match="a run of language models"):
        open_run(alone)
