"""A bundle's predictions are those of the run's own evaluation; a damaged or hostile bundle is one line."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedjets_flwr.data.clients import open_client
from fedjets_flwr.data.datasets import Images
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import Architecture, build, tail
from fedjets_flwr.models.flat_model import VectorSpec
from fedjets_flwr.moe.label_prior import em_prior, with_prior
from fedjets_flwr.moe.metrics import STATISTICS
from fedjets_flwr.personalize.inference import Predictions
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.trained_run import TrainedRun
from strategies.fedjets import FedJets
from tests.support.audited import told
from tests.support.methods import SERVED, needed
from tests.support.personal import call, drawn, finish

UNSEEN = 8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return finish(tmp_path_factory)


FAMILIAR = {"personalize__read_out": "familiar", "partition__public_share": 0.3}


@pytest.fixture(scope="module")
def held(run: TrainedRun) -> Images:
    return open_client(run.config, UNSEEN).images


@pytest.fixture(scope="module")
def made(run: TrainedRun, held: Images) -> Personaliser:
    return personalise(run, held.pixels)


@pytest.fixture
def bundle(made: Personaliser, tmp_path: Path) -> Path:
    made.save(tmp_path / "bundle")
    return tmp_path / "bundle"


# Equality with the run ------------------------------------------------------------------------------------------------


def check_like_the_run(run: TrainedRun, folder: Path) -> None:
    """Every unseen client: the same experts in the same order, and the same number of right answers.

    Without a gate the one that is surest answers all images; the others are not worth their bytes.
    """
    assert len(run.summary["per_client_accuracy"]) == 2
    for client, accuracy in run.summary["per_client_accuracy"].items():
        images = open_client(run.config, int(client)).images
        made = personalise(run, images.pixels)
        assert made.predictions is not None
        one = run.config.personalize.read_out == "surest" or (
            "gate" not in run.vectors and made.card.read_out == "top-1"
        )
        served = made.predictions.experts.unique().tolist() if one else run.summary["chosen"][client]
        if made.card.read_out == "common":  # it answers, and one expert says to whom it was preferred
            assert made.predictions.experts.tolist() == [-1] * len(images)
            served = served[:1]
        assert list(made.card.experts) == served
        assert set(served) <= set(run.summary["chosen"][client])
        made.save(folder / client)
        found = Personaliser.load(folder / client).predict(images.pixels)
        assert torch.equal(found.probabilities, made.predictions.probabilities)
        assert torch.equal(found.experts, made.predictions.experts)
        assert int((found.classes == images.labels).sum()) / len(images) == accuracy


@pytest.mark.parametrize("name", SERVED)
def test_every_method_answers_as_in_its_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str
) -> None:
    # A site's model answers by the mean of a representation, and not by draws of it.
    check_like_the_run(finish(tmp_path_factory, **needed(name), ensembles__members=3, fedsr__draws=0), tmp_path)


def test_experts_of_different_sizes_answer_as_in_their_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [Architecture("cnn", 4 + m, "batch", "cifar", 1, 10) for m in range(5)]
    monkeypatch.setattr(FedJets, "architecture", lambda self, expert: sizes[expert])
    check_like_the_run(finish(tmp_path_factory), tmp_path)


@pytest.mark.parametrize(("trainable", "embedding"), [("stage", "penultimate"), ("head", "logits")])
def test_tails_answer_as_in_their_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, trainable: str, embedding: str
) -> None:
    changes = {"moe__trainable": trainable, "common_expert__embedding": embedding, "personalize__read_out": "blend"}
    check_like_the_run(finish(tmp_path_factory, **changes), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"personalize__prior": "em"},
        {"personalize__prior": "em", "strategy__name": "fedmix", "personalize__read_out": "blend"},
        {"personalize__prior": "support", "personalize__statistics": "own", "personalize__read_out": "mixture"},
        {"personalize__prior": "map", "personalize__statistics": "own", "moe__trainable": "stage"},
        {"personalize__read_out": "surest"},
        {"strategy__name": "ifca", "personalize__statistics": "own", "cohort__sampling": "anchored"},
        {"personalize__read_out": "surest", "personalize__statistics": "own", "moe__top_k": 3},
        {**FAMILIAR, "moe__top_k": 3},
        {**FAMILIAR, "personalize__statistics": "own", "personalize__prior": "em"},
        {"transport__dtype": "float16", "moe__init": "common", "moe__top_k": 5},
    ],
    ids=[
        "em",
        "fedmix-em",
        "support-adabn",
        "map-adabn",
        "surest",
        "ifca-adabn",
        "surest-adabn",
        "familiar",
        "familiar-adabn",
        "float16",
    ],
)
def test_other_settings_answer_as_in_their_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, changes: dict[str, Any]
) -> None:
    check_like_the_run(finish(tmp_path_factory, **changes), tmp_path)


def with_small_variances(run: TrainedRun, expert: int) -> TrainedRun:
    """Return a run one of whose experts takes all that it sees for outliers, with the statistics it was trained to."""
    model = tail(build(run.serving.architectures[expert], 0), run.config.moe.trainable)
    places, vector = VectorSpec.of(model).positions("running_var"), run.vectors[f"expert.{expert}"].clone()
    assert len(places)
    vector[places] *= 1e-6
    return replace(run, vectors={**run.vectors, f"expert.{expert}": vector})


def test_without_a_gate_the_surest_is_chosen_with_the_statistics_that_it_answers_with(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """An expert that is surest only because its running variances are wrong is so no more once AdaBN resets them."""
    run = finish(tmp_path_factory, strategy__name="ifca", cohort__sampling="anchored")
    pixels = open_client(run.config, UNSEEN).images.pixels
    before = {statistics: personalise(run, pixels, statistics=statistics) for statistics in STATISTICS}
    (wrong, *_) = set(range(run.num_experts)) - {m for made in before.values() for m in made.card.experts}
    changed = with_small_variances(run, wrong)
    assert personalise(changed, pixels, statistics="trained").card.experts == (wrong,)
    after = personalise(changed, pixels, statistics="own")
    assert after.card.experts == before["own"].card.experts
    assert after.predictions is not None and before["own"].predictions is not None
    assert torch.equal(after.predictions.probabilities, before["own"].predictions.probabilities)
    assert set(after.predictions.experts.tolist()) == set(after.card.experts)


def test_an_oracle_cannot_serve_a_site_without_labels(run: TrainedRun, held: Images) -> None:
    config = run.config.model_copy(update={"gate": run.config.gate.model_copy(update={"mode": "oracle"})})
    with pytest.raises(FedjetsError, match=r"gate.mode = 'oracle' reads labels"):
        personalise(replace(run, config=config), held.pixels)


# What a personalised model does ---------------------------------------------------------------------------------------


def test_files_answer_as_their_pixels_and_labels_only_score(
    run: TrainedRun, held: Images, made: Personaliser, tmp_path: Path
) -> None:
    flat, classed = drawn(tmp_path / "flat", held), drawn(tmp_path / "classed", held, classed=True)
    a, b = personalise(run, flat), personalise(run, classed)
    assert a.card.experts == b.card.experts == made.card.experts
    assert a.predictions is not None and b.predictions is not None and made.predictions is not None
    assert torch.equal(a.predictions.probabilities, made.predictions.probabilities)
    assert a.predictions.accuracy is None
    assert b.predictions.accuracy == run.summary["per_client_accuracy"][str(UNSEEN)]
    assert b.predictions.files[0] == f"{int(held.labels.min())}/{Path(b.predictions.files[0]).name}"
    one = made.predict(flat / "0003.png")
    assert int(one.classes) == int(made.predictions.classes[3])
    two = made.predict([flat / "0003.png", str(flat / "0000.png")])
    assert two.classes.tolist() == made.predictions.classes[[3, 0]].tolist()
    assert made.predict(held.pixels.numpy()).classes.tolist() == made.predictions.classes.tolist()


def test_the_prior_is_that_of_the_images_of_personalising(run: TrainedRun, held: Images) -> None:
    """A question of one image gets the answer that it has among all: the stored prior, not one of one image."""
    plain, em = personalise(run, held.pixels, prior="none"), personalise(run, held.pixels, prior="em")
    assert plain.card.label_prior == em.card.label_prior
    assert sum(em.card.label_prior) == pytest.approx(1)
    assert plain.predictions is not None and em.predictions is not None
    raw = plain.predictions.probabilities
    torch.testing.assert_close(em.predictions.probabilities.double(), with_prior(raw, em_prior(raw)))
    alone = em.predict(held.pixels[5:6])
    torch.testing.assert_close(alone.probabilities[0], em.predictions.probabilities[5])


def test_fewer_experts_are_the_best_of_more(run: TrainedRun, held: Images) -> None:
    five = personalise(run, held.pixels, experts=5).card
    assert sorted(five.experts) == [0, 1, 2, 3, 4]
    assert [five.gate_scores[m] for m in five.experts] == sorted(five.gate_scores, reverse=True)
    one = personalise(run, held.pixels, experts=1, read_out="mixture")
    assert one.card.experts == five.experts[:1]
    assert one.predictions is not None
    assert set(one.predictions.experts.tolist()) == set(one.card.experts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 6}, "--experts 6: the run has 5"),
        ({"experts": -1}, "--experts -1"),
        ({"read_out": "best"}, "--read-out best: no such read-out; choose one of top-1"),
        ({"prior": "masked"}, "--prior masked"),
        ({"statistics": "site"}, "--statistics site: choose trained or own"),
        ({"device": "abacus"}, "--device abacus"),
    ],
)
def test_a_wrong_argument_is_named(run: TrainedRun, held: Images, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FedjetsError, match=message.replace("(", r"\(")):
        personalise(run, held.pixels, **arguments)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        np.zeros((8, 8), np.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        [],
        7,
        [3],
        b"abc",
    ],
    ids=["float", "channels", "flat", "none", "empty", "number", "numbers", "bytes"],
)
def test_what_are_no_images_is_told(made: Personaliser, images: object) -> None:
    with pytest.raises(FedjetsError, match=r"^images: .*expected"):
        made.predict(images)


def test_a_model_without_a_gate_is_served_whole(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run = finish(tmp_path_factory, strategy__name="ensembles", ensembles__members=2)
    pixels = open_client(run.config, UNSEEN).images.pixels
    made = personalise(run, pixels)
    made.save(tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "gate.safetensors").exists()
    assert made.card.experts == (0, 1)
    surest = made.card.gate_scores.index(1.0)
    assert sorted(made.card.gate_scores) == [0.0, 1.0]
    assert personalise(run, pixels, experts=1).card.experts == (surest,)


def test_a_bundle_is_never_written_over(made: Personaliser, bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(FedjetsError, match="there is something already"):
        made.save(bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


# Bundles from strangers -----------------------------------------------------------------------------------------------


def sign(bundle: Path) -> None:
    """Make the card's digests those of the files, as a forger would."""
    card = json.loads((bundle / "card.json").read_text())
    for name in card["sha256"]:
        if (bundle / name).is_file():
            card["sha256"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "card.json").write_text(json.dumps(card))


def refused(bundle: Path, *words: str) -> None:
    with pytest.raises(FedjetsError) as caught:
        Personaliser.load(bundle)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(bundle))
    assert all(word in text for word in words), text


@pytest.mark.parametrize("name", ["common-expert.safetensors", "gate.safetensors", "predictions.csv"])
def test_an_altered_byte_is_told(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-2] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, name, "altered")


@pytest.mark.parametrize("name", ["card.json", "gate.safetensors"])
def test_a_missing_file_is_told(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    refused(bundle, name, "missing")


def put(*keys: object) -> Callable[[dict[str, Any], object], None]:
    def change(card: Any, value: object) -> None:
        for key in keys[:-1]:
            card = card[key]
        card[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("sha256", "../../etc/passwd"), "0" * 64),
        (("sha256", "/etc/passwd"), "0" * 64),
        (("experts",), ["../x"]),
        (("experts",), [0, 0]),
        (("experts",), [7]),
        (("experts",), [-1]),
        (("experts",), []),
        (("image_shape",), [1, 8, 10**9]),
        (("image_shape",), [1, 8192, 8192]),
        (("image_shape",), [2, 8, 8]),
        (("label_prior",), [0.5, 0.5]),
        (("label_prior", 0), float("nan")),
        (("gate_scores",), []),
        (("model", "name"), "os.system"),
        (("model", "width"), -1),
        (("model", "width"), 1.5),
        (("model", "width"), 10**6),
        (("read_out",), "__import__"),
        (("trainable",), "none"),
        (("format_version",), 2),
        (("extra",), 1),
        (("classes",), ["a"] * 10),
    ],
    ids=str,
)
def test_a_hostile_card_is_refused(bundle: Path, where: tuple[object, ...], value: object) -> None:
    card = json.loads((bundle / "card.json").read_text())
    put(*where)(card, value)
    (bundle / "card.json").write_text(json.dumps(card))
    refused(bundle, "card.json: damaged, or of another version")


@pytest.mark.parametrize("width", [9, 1024])
def test_a_claimed_size_costs_no_memory(bundle: Path, width: int) -> None:
    card = json.loads((bundle / "card.json").read_text())
    card["model"]["width"] = width
    (bundle / "card.json").write_text(json.dumps(card))
    refused(bundle, "expert-", "not the weights of this model")


def forge(path: Path, change: Callable[[dict[str, torch.Tensor]], object], metadata: dict[str, str]) -> None:
    """Change the tensors or the metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        told = (file.metadata() or {}) | metadata
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    safetensors.torch.save_file(tensors, path, told)


@pytest.mark.parametrize("name", ["common-expert", "gate", "expert"])
@pytest.mark.parametrize("kind", ["shape", "missing", "extra", "escape", "nan", "dtype", "garbage", "empty"])
def test_forged_weights_are_refused(bundle: Path, made: Personaliser, name: str, kind: str) -> None:
    path = bundle / (f"expert-{made.card.experts[0]}.safetensors" if name == "expert" else f"{name}.safetensors")
    last = {"gate": "output.weight"}.get(name, "head.weight")
    changes: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "shape": lambda t: t.update({last: t[last][:, :-1].clone()}),
        "missing": lambda t: t.pop(last),
        "extra": lambda t: t.update(more=torch.zeros(1)),
        "escape": lambda t: t.update({"\x1b[2Jmore": torch.zeros(1)}),
        "nan": lambda t: t.update({last: t[last] * float("nan")}),
        "dtype": lambda t: t.update({last: t[last].to(torch.complex64)}),
    }
    if kind in changes:
        forge(path, changes[kind], {})
    else:
        path.write_bytes(b"\x80\x04" * 20 if kind == "garbage" else b"")
    sign(bundle)
    refused(bundle, path.name)


@pytest.mark.parametrize(
    "metadata",
    [
        {"width": "100000000"},
        {"name": "resnet999"},
        {"width": "x"},
        {"mean": "0.5,0.5"},
        {"num_classes": "11"},
        {"channels": "3"},
        {"mean": "nan"},
        {"arch": "resnet20"},
    ],
    ids=str,
)
def test_a_forged_common_expert_is_refused(bundle: Path, metadata: dict[str, str]) -> None:
    forge(bundle / "common-expert.safetensors", lambda tensors: None, metadata)
    sign(bundle)
    refused(bundle, "common-expert.safetensors")


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mangled_bundle_loads_or_is_one_line(made: Personaliser, tmp_path: Path, data: st.DataObject) -> None:
    bundle = tmp_path / "mangled"
    shutil.rmtree(bundle, ignore_errors=True)
    made.save(bundle)
    path = bundle / data.draw(st.sampled_from(["card.json", "common-expert.safetensors", "gate.safetensors"]))
    content = bytearray(path.read_bytes())
    head = min(len(content), 1500)  # where lengths, names and shapes stand
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, head - 1), st.integers(0, 255)), min_size=1)):
        content[at] = value
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), head]))])
    if path.name != "card.json":
        sign(bundle)
    try:
        Personaliser.load(bundle)
    except FedjetsError as error:
        assert "\n" not in str(error)


# Commands -------------------------------------------------------------------------------------------------------------


def test_personalize_and_predict(
    run: TrainedRun, held: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    accuracy = run.summary["per_client_accuracy"][str(UNSEEN)]
    classed = drawn(tmp_path / "classed", held, classed=True)
    audit = ("--audit-log", "audit.jsonl")
    assert call(monkeypatch, "personalize", "--run", run.folder, "--images", classed, *audit) == 0
    assert f"accuracy {accuracy:.4f}" in capfd.readouterr().out
    (noted,) = told(tmp_path / "audit.jsonl")
    assert noted["what"] == "exported"
    assert noted["file"] == str(tmp_path / "bundles" / "run-classed")
    assert noted["weights_hash"] == run.summary["weights_hash"]
    bundle = tmp_path / "bundles" / "run-classed"
    assert call(monkeypatch, "predict", bundle, classed) == 0
    shown = capfd.readouterr()
    assert shown.out == (bundle / "predictions.csv").read_text()
    assert f"accuracy {accuracy:.4f}" in shown.err
    rows = list(csv.DictReader(shown.out.splitlines()))
    assert len(rows) == len(held)
    right = sum(row["class"] == row["file"].split("/")[0] for row in rows)
    assert right / len(rows) == accuracy
    assert {int(row["expert"]) for row in rows} <= set(run.summary["chosen"][str(UNSEEN)])
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    assert call(monkeypatch, "predict", bundle, classed, "--output", "found.csv") == 0
    assert (tmp_path / "found.csv").read_text() == shown.out


def test_options_of_personalize_reach_the_bundle(
    run: TrainedRun, held: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The card tells the read-out and the prior; the statistics are those in the experts' files."""
    folder = drawn(tmp_path / "images", held)
    asked = ("personalize", "--run", run.folder, "--images", folder, "--output")
    options = ("--prior", "em", "--statistics", "own", "--read-out", "mixture")
    assert call(monkeypatch, *asked, tmp_path / "bundle", *options) == 0
    card = json.loads((tmp_path / "bundle" / "card.json").read_text())
    assert (card["read_out"], card["prior"]) == ("mixture", "em")
    found = Personaliser.load(tmp_path / "bundle")
    wanted, trained = (personalise(run, folder, 0, "mixture", "em", statistics=word) for word in ("own", "trained"))
    assert wanted.card.experts == trained.card.experts == found.card.experts
    for m, expert in found.experts.items():
        assert torch.equal(expert.vector, wanted.experts[m].vector)
        assert not torch.equal(expert.vector, trained.experts[m].vector)
    capfd.readouterr()
    assert call(monkeypatch, *asked, tmp_path / "other", "--statistics", "site") == 1
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "error: --statistics site: choose trained or own\n")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("personalize", "--run", "nothing", "--images", "."), "nothing/config.json is missing"),
        (("personalize", "--run", "RUN", "--images", "nothing"), "nothing: no such folder of images"),
        (("personalize", "--run", "RUN", "--images", "empty"), "empty: no image in it"),
        (("personalize", "--run", "RUN", "--images", "empty", "--output", "."), ".: there is something already"),
        (("predict", "empty", "empty"), "empty/card.json: missing"),
        (("predict", "BUNDLE", "empty"), "empty: no image in it"),
        (("export", "empty", "--onnx", "x.onnx"), "empty/card.json: missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_command_is_one_line(
    run: TrainedRun, bundle: Path, arguments: tuple[str, ...], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"RUN": run.folder, "BUNDLE": bundle}
    assert call(monkeypatch, *(places.get(word, word) for word in arguments)) == 1
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1


def test_names_of_files_need_not_be_text(made: Personaliser, held: Images, tmp_path: Path) -> None:
    """Commas, quotes and bytes that are not UTF-8 come back as they are, line ends as text."""
    drawn(tmp_path / "images", held.subset(np.arange(3)))
    names = [b'a,"b".png', b"line\nend.png", b"\xff\xfe.png"]
    for old, name in zip(sorted((tmp_path / "images").iterdir()), names, strict=True):
        old.rename(old.parent / name.decode("utf-8", "surrogateescape"))
    text = made.predict(tmp_path / "images").csv().decode("utf-8", "surrogateescape")
    found = [row["file"].encode("utf-8", "surrogateescape") for row in csv.DictReader(text.splitlines(keepends=True))]
    assert sorted(found) == sorted(name.replace(b"\n", rb"\x0a") for name in names)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "a\x1b[31m", "b\x9bm"])
def test_no_name_is_a_formula_or_a_control(name: str) -> None:
    found = Predictions(torch.ones(1, 1), torch.tensor([0]), torch.tensor([0]), (name,), (f"{name}.png",))
    row = list(csv.reader(found.csv().decode().splitlines()))[1]
    for cell in row[:2]:
        assert cell.isprintable()
        assert not cell.lstrip().startswith(("=", "+", "-", "@"))
        assert cell.startswith(("'", "a", "b", "\\x"))


@pytest.mark.parametrize("name", ["card.json", "expert-0.safetensors", "gate.safetensors", "predictions.csv"])
def test_a_file_larger_than_its_model_is_not_read(
    made: Personaliser, bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    name = name.replace("expert-0", f"expert-{made.card.experts[0]}")
    with (bundle / name).open("r+b") as file:
        file.truncate(2**31)
    monkeypatch.setattr(Path, "read_bytes", _no_giants(Path.read_bytes))
    refused(bundle, name, "more than the")


def _no_giants(read: Callable[[Path], bytes]) -> Callable[[Path], bytes]:
    def checked(path: Path) -> bytes:
        assert path.stat().st_size < 2**30
        return read(path)

    return checked
