"""The read-out that knows when no expert knows a client's samples, in whole runs and against hostile anchors."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.personalize.onnx_export import export_onnx
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.wire.messages import Reply
from strategies import strategy
from tests.support import by_hand
from tests.support.by_hand import Array
from tests.support.in_process import Finished
from tests.support.runs import TinyRunner, tiny_run
from tests.support.tiny import CLASSES, EXPERTS, TinyMethod, common_expert, samples_of, tiny, tiny_method

__all__ = ["tiny_run"]

UNSEEN = (7, 8)
FAMILIAR: dict[str, Scalar] = {"personalize__read_out": "familiar"}


def entropy(p: Array) -> float:
    return float(-(p * np.log(p)).sum(axis=1).mean())


def answers(run: Finished, expert: int, client: int) -> Array:
    """Return what an expert answers; a head has no batch norm, and AdaBN changes nothing."""
    vector = run.vectors[f"expert.{expert}"].double().numpy()
    return by_hand.softmax(by_hand.expert(vector, samples_of(run.config, client).x)[0])


def less_sure(run: Finished, client: int) -> float:
    """Return how much less sure the gate's first choice is of the client's samples than of its anchor's."""
    gate = run.vectors["gate"].double().numpy()
    first = int(by_hand.scores(gate, samples_of(run.config, client).h).sum(axis=0).argmax())
    return entropy(answers(run, first, client)) - entropy(answers(run, first, run.strategy.anchors[first]))


def common_less_sure(run: Finished, client: int) -> float:
    """Return the same of a common expert that is usually quite sure, with statistics of the client's samples."""
    model = copy.deepcopy(common_expert().model).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    pixels = common_expert().normalise(open_client(run.config, client).images.pixels)
    with torch.no_grad():
        model(pixels)
        return entropy(model.eval()(pixels).double().softmax(1).numpy())


def with_usual(runner: TinyRunner, nats: float) -> dict[str, Scalar]:
    """Return settings with a common expert that tells how sure it usually is; a process reads a file once."""
    path = runner.folder / f"common-{nats}.safetensors"
    save_common_expert(replace(common_expert(), usual_entropy=nats), path)
    return FAMILIAR | {"common_expert__path": str(path)}


def right(run: Finished, p: Array, client: int) -> float:
    return float((p.argmax(axis=1) == samples_of(run.config, client).y).mean())


NEVER = 0.0
"""A usual entropy with which a common expert that nobody trained is kept by nobody."""


def test_anchors_tell_how_sure_their_experts_are_and_nobody_keeps_what_is_never_sure(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedjets", **with_usual(tiny_run, NEVER))
    record = read_metrics(run.config.run_dir)[-1]["evaluation"]
    assert record["readings"]["familiar/none"] == record["readings"]["top-1/none"] == record["accuracy"]
    assert record["kept_common"] == []
    usual = json.loads((run.config.run_dir / "summary.json").read_text())["usual"]
    assert usual == pytest.approx({str(m): entropy(answers(run, m, run.strategy.anchors[m])) for m in range(EXPERTS)})


def test_the_common_expert_answers_clients_to_whose_samples_it_is_more_familiar(tiny_run: TinyRunner) -> None:
    """Its usual entropy lies between those at which it is kept by both unseen clients, and by none."""
    run = tiny_run("fedjets", **with_usual(tiny_run, NEVER))
    edges = {c: common_less_sure(run, c) - less_sure(run, c) for c in UNSEEN}
    low, high = sorted(UNSEEN, key=edges.__getitem__)
    for usual, kept in (
        (edges[low] - 0.01, []),
        ((edges[low] + edges[high]) / 2, [low]),
        (edges[high] + 0.01, sorted(UNSEEN)),
    ):
        again = tiny_run("fedjets", **with_usual(tiny_run, usual))
        record = read_metrics(again.config.run_dir)[-1]["evaluation"]
        assert sorted(record["kept_common"]) == kept
        assert json.loads((again.config.run_dir / "summary.json").read_text())["kept_common"] == record["kept_common"]
        for client in kept:
            p = by_hand.softmax(samples_of(run.config, client).h)
            assert record["per_client_accuracy"][str(client)] == pytest.approx(right(run, p, client))


def test_a_site_keeps_the_common_expert_as_in_the_run_and_in_its_bundle(tiny_run: TinyRunner) -> None:
    run = open_run(tiny_run("fedjets", **with_usual(tiny_run, 100.0)).config.run_dir)
    images = open_client(run.config, UNSEEN[0]).images
    made = personalise(run, images.pixels)
    assert made.card.read_out == "common"
    assert len(made.experts) == 1
    made.save(tiny_run.folder / "bundle")
    found = Personaliser.load(tiny_run.folder / "bundle").predict(images.pixels)
    expected = common_expert().model(common_expert().normalise(images.pixels)).softmax(1)
    torch.testing.assert_close(found.probabilities, expected.detach())
    assert found.experts.tolist() == [-1] * len(images)
    assert {line.split(",")[-1] for line in found.csv().decode().splitlines()[1:]} == {"common"}
    assert export_onnx(made, tiny_run.folder / "site.onnx", images.pixels[:5]) < 1e-4
    accuracy = int((found.classes == images.labels).sum()) / len(images)
    assert accuracy == pytest.approx(run.summary["per_client_accuracy"][str(UNSEEN[0])])


def test_a_resumed_run_with_nothing_left_to_do_tells_it_all_the_same(tiny_run: TinyRunner) -> None:
    """As after a kill between the last checkpoint and the summary."""
    settings = with_usual(tiny_run, NEVER) | {"run__name": "same"}
    before = open_run(tiny_run("fedjets", **settings).config.run_dir)
    (before.folder / "summary.json").unlink()
    again = open_run(tiny_run("fedjets", **settings, run__resume=True).config.run_dir)
    assert again.usual == before.usual
    assert list(again.usual) == list(range(EXPERTS))


def test_what_it_needs_is_said(tiny_run: TinyRunner) -> None:
    run = open_run(tiny_run("fedjets").config.run_dir)
    with pytest.raises(FedjetsError, match=r"its anchors were not asked .* train with personalize.read-out"):
        personalise(run, open_client(run.config, UNSEEN[0]).images.pixels, read_out="familiar")
    with pytest.raises(FedjetsError, match=r"does not tell how sure it usually is.* partition.public-share above 0"):
        tiny_run("fedjets", **FAMILIAR)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("fedavg", {}, "set strategy.name to 'fedjets'"),
        ("ensembles", {"cohort__sampling": "anchored"}, "set strategy.name to 'fedjets'"),
        ("fedmix", {"cohort__sampling": "anchored"}, "set strategy.name to 'fedjets'"),
        ("ifca", {"cohort__sampling": "anchored"}, "set strategy.name to 'fedjets'"),
        ("fedjets", {"cohort__sampling": "uniform"}, "cohort.sampling to 'anchored'"),
        ("fedjets", {"cohort__anchors": 0}, "cohort.anchors to 1"),
        ("fedjets", {"partition__test_share": 0.2}, "set partition.test-share to 0"),
        ("fedjets", {"privacy__route_epsilon": 1.0}, "set privacy.noise-multiplier and privacy.route-epsilon to 0"),
    ],
)
def test_settings_with_which_nothing_could_be_compared_are_refused(
    name: str, changes: dict[str, Scalar], why: str
) -> None:
    with pytest.raises(FedjetsError, match=f"personalize.read-out = 'familiar': .*{why}"):
        strategy(name).validate(tiny(strategy__name=name, **FAMILIAR | changes))
    strategy("fedjets").validate(tiny(**FAMILIAR))


def vouching(told: dict[int, float]) -> TinyMethod:
    """Return a method before its first round, whose anchors tell how sure their experts are."""
    return tiny_method("fedjets", entropies(told), **FAMILIAR)


def entropies(told: dict[int, float]) -> list[Reply]:
    return [Reply(client, {}, {"usual-entropy": nats}) for client, nats in told.items()]


def test_every_anchor_is_asked_for_its_own_expert() -> None:
    method = vouching({0: 0.5, 1: 0.25, 2: 1.0})
    method.rounds.scoring.vouch(2)
    assert method.rounds.scoring.usual == {0: 0.5, 1: 0.25, 2: 1.0}
    ((kind, _, jobs),) = method.exchange.asked
    assert kind == "query.vouch"
    assert [(job.client, tuple(job.vectors)) for job in jobs] == [(m, (f"expert.{m}",)) for m in range(EXPERTS)]
    assert method.exchange.served == [True]


def test_an_anchor_that_opted_out_is_not_asked() -> None:
    method = vouching({1: 0.25, 2: 1.0})
    method.strategy.opted_out = frozenset({0})
    method.rounds.scoring.vouch(2)
    ((_, _, jobs),) = method.exchange.asked
    assert [job.client for job in jobs] == [1, 2]


def test_an_anchor_that_tells_no_entropy_is_refused_and_its_last_one_counts() -> None:
    method = vouching({0: 0.5, 1: 0.25})
    method.rounds.scoring.vouch(2)
    method.exchange.given = entropies({0: math.log(CLASSES) + 0.01, 1: -0.01})
    method.rounds.scoring.vouch(4)
    assert method.rounds.scoring.usual == {0: 0.5, 1: 0.25}


def test_an_expert_of_which_nobody_told_stands_in_the_middle() -> None:
    told, silent = vouching({0: 0.5, 1: 0.25}), vouching({})
    found = []
    for method in (told, silent):
        method.strategy.common = replace(common_expert(), usual_entropy=0.75)
        method.rounds.scoring.served = {7: ("expert.2", "expert.0", "gate")}
        method.rounds.scoring.vouch(2)
        found.append(method.rounds.scoring.usual_of(7))
    assert found == [{"usual.expert": 375_000, "usual.common": 750_000}, {}]
