"""A bundle's predictions are those of the run's own evaluation; a damaged or hostile bundle is one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import strategies
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.finished import FinishedRun, open_run
from fedjets_flwr.personaliser import Personaliser, personalise
from tests.in_process import run_in_process

TINY = {
    "run__rounds": 2, "run__evaluate_every": 2, "partition__clients": 8, "partition__unseen_clients": 2,
    "partition__samples_per_client": 30, "cohort__anchors": 3, "cohort__normals": 3, "moe__experts": 5,
    "common_expert__target_accuracy": 0.3, "model__width": 8, "run__name": "run",
}  # fmt: skip

Finish = Callable[..., FinishedRun]


@pytest.fixture
def finish(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Finish:
    cache = str(tmp_path_factory.getbasetemp() / "shared-cache")

    def start(**changes: object) -> FinishedRun:
        run_in_process(tmp_path, monkeypatch, **(TINY | {"run__cache_dir": cache} | changes))  # type: ignore[arg-type]
        return open_run(tmp_path / "runs" / "run")

    return start


def check_like_the_run(run: FinishedRun, folder: Path) -> None:
    """Every unseen client: the same experts in the same order, and the same number of right answers."""
    for client, accuracy in run.summary["per_client_accuracy"].items():
        held = open_client(run.config, int(client)).images
        made = personalise(run, held.pixels)
        assert list(made.card.experts) == run.summary["chosen"][client]
        made.save(folder / client)
        found = Personaliser.load(folder / client).predict(held.pixels)
        assert made.predictions is not None
        assert torch.equal(found.probabilities, made.predictions.probabilities)
        assert torch.equal(found.experts, made.predictions.experts)
        assert int((found.classes == held.labels).sum()) == round(accuracy * len(held))
        assert int((found.classes == held.labels).sum()) / len(held) == accuracy


@pytest.mark.parametrize("name", strategies.names())
@pytest.mark.parametrize("prior", ["none", "em"])
def test_every_method_answers_as_in_its_run(finish: Finish, tmp_path: Path, name: str, prior: str) -> None:
    check_like_the_run(finish(strategy__name=name, personalize__prior=prior), tmp_path)


@pytest.mark.parametrize("trainable", ["stage", "head"])
@pytest.mark.parametrize("embedding", ["penultimate", "logits"])
def test_tails_answer_as_in_their_run(finish: Finish, tmp_path: Path, trainable: str, embedding: str) -> None:
    changes = {"moe__trainable": trainable, "common_expert__embedding": embedding, "personalize__read_out": "blend"}
    check_like_the_run(finish(**changes), tmp_path)
