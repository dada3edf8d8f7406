"""The read-out that knows when no expert knows a client's samples, in whole runs and against hostile anchors."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.personalize.personaliser import Personaliser, personalise
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.wire.messages import Reply
from server_app.evaluation import vouched
from strategies import strategy
from tests.support import by_hand
from tests.support.by_hand import Array
from tests.support.in_process import Finished
from tests.support.runs import TinyRunner, tiny_run
from tests.support.tiny import CLASSES, EXPERTS, CannedExchange, common_expert, samples_of, tiny

__all__ = ["tiny_run"]

UNSEEN = (7, 8)
FAMILIAR: dict[str, Scalar] = {"personalize__read_out": "familiar"}


def entropy(p: Array) -> float:
    return float(-(p * np.log(p)).sum(axis=1).mean())


def answers(run: Finished, expert: int, client: int) -> Array:
    """Return what an expert answers; a head has no batch norm, and AdaBN changes nothing."""
    vector = run.vectors[f"expert.{expert}"].double().numpy()
    return by_hand.softmax(by_hand.expert(vector, samples_of(run.config, client).x)[0])


def less_sure(run: Finished, client: int) -> dict[int, float]:
    """Return how much less sure the client's K experts are of its samples than each is of its anchor's."""
    gate = run.vectors["gate"].double().numpy()
    order = np.argsort(-by_hand.scores(gate, samples_of(run.config, client).h).sum(axis=0))
    chosen = [int(m) for m in order[: run.config.moe.top_k]]
    return {m: entropy(answers(run, m, client)) - entropy(answers(run, m, anchor)) for m, anchor in
            ((m, run.strategy.anchors[m]) for m in chosen)}  # fmt: skip


def common_less_sure(run: Finished, client: int, usual: float) -> float:
    """Return the same of the common expert, with batch-norm statistics of the client's samples."""
    model = copy.deepcopy(common_expert().model).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    pixels = common_expert().normalise(open_client(run.config, client).images.pixels)
    with torch.no_grad():
        model(pixels)
        return entropy(model.eval()(pixels).double().softmax(1).numpy()) - usual


def with_usual(runner: TinyRunner, nats: float) -> dict[str, Scalar]:
    """Return settings with a common expert that tells how sure it usually is; a process reads a file once."""
    path = runner.folder / f"common-{nats}.safetensors"
    save_common_expert(replace(common_expert(), usual_entropy=nats), path)
    return FAMILIAR | {"common_expert__path": str(path)}


def right(run: Finished, p: Array, client: int) -> float:
    return float((p.argmax(axis=1) == samples_of(run.config, client).y).mean())


def test_the_expert_answers_that_is_the_least_less_sure_than_of_its_anchors_samples(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedjets", **FAMILIAR)
    record = read_metrics(run.config.run_dir)[-1]["evaluation"]
    accuracies = {}
    for client in UNSEEN:
        found = less_sure(run, client)
        assert len(found) == 2
        accuracies[str(client)] = right(run, answers(run, min(found, key=found.__getitem__), client), client)
    assert record["per_client_accuracy"] == pytest.approx(accuracies)
    assert record["kept_common"] == []
    usual = json.loads((run.config.run_dir / "summary.json").read_text())["serving"]["usual"]
    assert usual == pytest.approx({str(m): entropy(answers(run, m, run.strategy.anchors[m])) for m in range(EXPERTS)})


def test_the_common_expert_answers_clients_that_it_knows_better_than_every_expert_does(tiny_run: TinyRunner) -> None:
    """Its usual entropy lies between those at which it is kept by both unseen clients, and by none."""
    run = tiny_run("fedjets", **FAMILIAR)
    edges = {c: common_less_sure(run, c, 0.0) - min(less_sure(run, c).values()) for c in UNSEEN}
    low, high = sorted(UNSEEN, key=edges.__getitem__)
    for usual, kept in (
        (edges[low] - 0.01, []),
        ((edges[low] + edges[high]) / 2, [low]),
        (edges[high] + 0.01, sorted(UNSEEN)),
    ):
        again = tiny_run("fedjets", **with_usual(tiny_run, usual))
        record = read_metrics(again.config.run_dir)[-1]["evaluation"]
        assert sorted(record["kept_common"]) == kept
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
    accuracy = int((found.classes == images.labels).sum()) / len(images)
    assert accuracy == pytest.approx(run.summary["per_client_accuracy"][str(UNSEEN[0])])


def test_a_site_gets_the_expert_that_answers_in_the_run(tiny_run: TinyRunner) -> None:
    finished = tiny_run("fedjets", **FAMILIAR)
    run = open_run(finished.config.run_dir)
    for client in UNSEEN:
        found = less_sure(finished, client)
        made = personalise(run, open_client(run.config, client).images.pixels)
        assert (list(made.experts), made.card.read_out) == ([min(found, key=found.__getitem__)], "top-1")


def test_what_it_needs_is_said(tiny_run: TinyRunner) -> None:
    run = open_run(tiny_run("fedjets").config.run_dir)
    with pytest.raises(FedjetsError, match=r"its anchors were not asked .* train with personalize.read-out"):
        personalise(run, open_client(run.config, UNSEEN[0]).images.pixels, read_out="familiar")
    for name, changes in (("fedavg", {}), ("ensembles", {})):
        with pytest.raises(
            FedjetsError, match=r"personalize.read-out = 'familiar': compares with the experts' anchors"
        ):
            strategy(name).validate(tiny(strategy__name=name, **FAMILIAR, **changes))
    strategy("fedjets").validate(tiny(**FAMILIAR))


def test_anchors_that_tell_no_entropy_are_refused_and_those_that_opted_out_not_asked(tiny_run: TinyRunner) -> None:
    method = tiny_run("fedjets", **FAMILIAR).strategy
    method.opted_out = frozenset({method.anchors[0]})
    told = (math.log(CLASSES) + 0.01, -0.01)
    exchange = CannedExchange(
        [Reply(c, {}, {"usual-entropy": nats}) for c, nats in zip(method.anchors[1:], told, strict=True)]
    )
    usual, failed = vouched(exchange, 3, method)  # type: ignore[arg-type]
    assert usual == {}
    assert set(failed) == set(method.anchors[1:])
    ((kind, _, jobs),) = exchange.asked
    assert kind == "query.vouch"
    assert [(job.client, tuple(job.vectors)) for job in jobs] == [
        (client, (f"expert.{m}",)) for m, client in enumerate(method.anchors) if m > 0
    ]
    exchange.given = [Reply(method.anchors[2], {}, {"usual-entropy": 0.5})]
    assert vouched(exchange, 3, method)[0] == {2: 0.5}  # type: ignore[arg-type]
