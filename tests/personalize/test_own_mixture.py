"""A site's own mixture of a run's model and a specialist: trained on its labelled images, saved, loaded, exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedjets_flwr.data.clients import open_client
from fedjets_flwr.data.datasets import Images
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.own_training import Held
from fedjets_flwr.personalize import own_mixture
from fedjets_flwr.personalize.onnx_export import export_onnx
from fedjets_flwr.personalize.own_mixture import personalise_labelled
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.trained_run import TrainedRun
from tests.support.personal import call, drawn, finish

CLIENT = 4
"""A client that trains; a site that took no part has images like its own."""


@pytest.fixture(scope="module", params=["network", "head"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TrainedRun:
    return finish(tmp_path_factory, strategy__name="fedavg", specialist__gate=request.param, adapt__max_epochs=20)


@pytest.fixture(scope="module")
def held(run: TrainedRun) -> Images:
    return open_client(run.config, CLIENT).images


@pytest.fixture(scope="module")
def folder(held: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("site"), held, classed=True)


def test_it_learns_what_the_site_holds_and_keeps_the_generalist(run: TrainedRun, folder: Path) -> None:
    made, plain = personalise_labelled(run, folder), personalise(run, folder)
    assert made.predictions is not None and plain.predictions is not None
    held, known = made.predictions, dict(zip(plain.predictions.files, plain.predictions.classes, strict=True))
    assert held.accuracy is not None and held.labels is not None
    before = sum(int(known[file] == label) for file, label in zip(held.files, held.labels, strict=True)) / len(held)
    assert 0 < len(held) < len(known) / 2  # those that no weight was trained on
    assert held.accuracy > before + 0.1
    shared = torch.cat([p.flatten() for p in made.experts[0].module.shared.parameters()])  # type: ignore[union-attr]
    assert torch.equal(shared, run.vectors["expert.0"][: len(shared)])
    again = personalise_labelled(run, folder)
    assert again.predictions is not None
    assert torch.equal(again.predictions.probabilities, made.predictions.probabilities)


def test_a_bundle_answers_as_what_was_saved(run: TrainedRun, folder: Path, held: Images, tmp_path: Path) -> None:
    made = personalise_labelled(run, folder)
    made.save(tmp_path / "site")
    loaded = Personaliser.load(tmp_path / "site")
    assert made.predictions is not None
    again = dict(zip((found := loaded.predict(folder)).files, found.probabilities, strict=True))
    assert all(
        torch.equal(again[file], row)
        for file, row in zip(made.predictions.files, made.predictions.probabilities, strict=True)
    )
    counted = [len(list((folder / name).glob("*.png"))) for name in loaded.card.classes]
    assert loaded.card.label_prior == pytest.approx([count / sum(counted) for count in counted])
    card = json.loads((tmp_path / "site" / "card.json").read_text())
    assert card["mixture"] == {"gate": run.config.specialist.gate, "mix": "probs"}
    assert "by its labels" in card["about"] and "without labels" not in card["about"]
    card["mixture"]["gate"] = {"network": "head", "head": "network"}[card["mixture"]["gate"]]
    (tmp_path / "site" / "card.json").write_text(json.dumps(card))
    with pytest.raises(FedjetsError, match="not the weights of this model"):
        Personaliser.load(tmp_path / "site")


def test_its_graph_gives_its_answers(run: TrainedRun, folder: Path, held: Images, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export_onnx(personalise_labelled(run, folder), tmp_path / "site.onnx", held.pixels) <= 1e-4


def test_the_command_makes_it_and_says_what_it_needs(
    run: TrainedRun, folder: Path, held: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    wanted = ("personalize", "--run", run.folder, "--images")
    assert call(monkeypatch, *wanted, folder, "--labels", "--output", "site") == 0
    printed = capsys.readouterr().out
    count = len(list(folder.rglob("*.png")))
    assert f"trained on {count - round(0.2 * count)} images, stopped by {round(0.2 * count)} others" in printed
    assert call(monkeypatch, "predict", "site", folder) == 0
    capsys.readouterr()
    assert call(monkeypatch, *wanted, drawn(tmp_path / "flat", held), "--labels") == 1
    assert "--labels" in capsys.readouterr().err
    assert call(monkeypatch, *wanted, folder, "--labels", "--experts", "1") == 1
    assert "--labels: not with --experts" in capsys.readouterr().err


def test_it_goes_beside_one_model(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> None:
    with pytest.raises(FedjetsError, match=r"--labels: run left 5 experts, and a specialist goes beside one model"):
        personalise_labelled(finish(tmp_path_factory), folder)


def test_what_trains_the_two_phases_and_what_stops_them(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No image does both; training images are augmented anew each time, at the rate of its own phase."""
    trained = finish(
        tmp_path_factory, strategy__name="fedavg", specialist__start="scratch", specialist__lr=0.004, adapt__lr=0.02,
        adapt__max_epochs=2, partition__val_share=0.25, partition__test_share=0.25, data__augment="crop",
    )  # fmt: skip
    phases: list[tuple[torch.Tensor, Held, Held, float]] = []

    def spied(
        model: FlatModel, train: Held, stop: Held, losses: object, rule: object, lr: float, order: object
    ) -> None:
        phases.append((model.vector.clone(), train, stop, lr))

    monkeypatch.setattr(own_mixture, "fit_own", spied)
    personalise_labelled(trained, folder)
    (start, train, stop, first), (_, again, _, second) = phases
    count = len(list(folder.rglob("*.png")))
    assert (len(train.targets), len(stop.targets)) == (count - round(0.25 * count), round(0.25 * count))
    assert again is train and (first, second) == (0.02, 0.004)
    assert not torch.equal(start, trained.vectors["expert.0"])  # from scratch
    rows = torch.arange(len(train.targets))
    assert not torch.equal(train.inputs(rows), train.inputs(rows))
    held = torch.arange(len(stop.targets))
    assert torch.equal(stop.inputs(held), stop.inputs(held))
    plain = replace_augment(trained)
    personalise_labelled(plain, folder)
    seen = torch.cat([phases[2][1].inputs(rows), phases[2][2].inputs(held)])
    pixels = {tuple(image.flatten().tolist()) for image in seen}
    assert len(pixels) == count


def replace_augment(run: TrainedRun) -> TrainedRun:
    """The same run whose images are not augmented."""
    data = run.config.data.model_copy(update={"augment": "none"})
    return replace(run, config=run.config.model_copy(update={"data": data}))


def test_a_run_of_one_expert_with_a_gate_serves_as_well(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> None:
    one = {"moe__experts": 1, "moe__top_k": 1, "cohort__anchors": 1, "partition__anchors": 1}
    gated = finish(tmp_path_factory, partition__name="dirichlet", adapt__max_epochs=2, **one)
    assert not personalise_labelled(gated, folder).card.gated
