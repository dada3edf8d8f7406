"""What simulated attackers make of honest work, on linear experts, and on whole ones where batch norm is the aim."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from client_app.attacks import (
    BOOST,
    POISONS,
    RUINED,
    Target,
    adaptive,
    flip,
    gaussian,
    holders,
    poisoning,
    replacement,
    ruined_statistics,
    sign_flip,
)
from client_app.client import Update
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.wire.messages import Job
from tests.support.runs import TinyRunner
from tests.support.tiny import context_of, start_vectors, tiny, tiny_runtime

JUDGED: dict[str, Scalar] = {"aggregation__rule": "validated", "partition__public_share": 0.3}


def target_of(folder: Path, sent: Tensor, trained: Tensor, name: str = "expert.1", **changes: Scalar) -> Target:
    runtime = tiny_runtime(folder, attack__kind="adaptive", attack__share=0.4, **changes)
    context = context_of(runtime, Job(0, {}), 1)
    spec = VectorSpec.plain(sent.numel())
    return Target(context, name, sent, trained, spec, torch.Generator().manual_seed(3))


def expert() -> tuple[Tensor, Tensor]:
    sent = start_vectors("expert.1")["expert.1"]
    return 0.01 * sent, 0.01 * sent + 3 * torch.linspace(-1, 2, len(sent))


def test_the_plain_attacks_in_closed_form(tmp_path: Path) -> None:
    sent, trained = expert()
    target = target_of(tmp_path, sent, trained)
    assert torch.allclose(sign_flip(target), sent - BOOST * (trained - sent), atol=1e-6)
    noise = gaussian(target) - sent
    assert float(noise.norm()) == pytest.approx(BOOST * float((trained - sent).norm()), rel=1e-4)
    assert abs(float(torch.cosine_similarity(noise, trained - sent, dim=0))) < 0.5
    holders = (2 + 3 * 2) / 3  # two anchors, three normals with two experts each, three experts
    assert torch.allclose(replacement(target), sent + holders * (-trained - sent), atol=1e-5)
    assert torch.equal(ruined_statistics(target), trained)  # a linear expert has none


@pytest.mark.parametrize(
    ("name", "sampling", "count"),
    [
        ("fedjets", "anchored", (2 + 3 * 2) / 3),
        ("fedjets", "uniform", 5 * 2 / 3),
        ("fedavg", "", 5),
        ("fedmix", "", 5),
        ("ensembles", "", 5),
        ("ifca", "anchored", 5 / 3),
    ],
)
def test_replacement_knows_how_many_train_an_expert_of_each_method(name: str, sampling: str, count: float) -> None:
    """Two anchors and three normal clients a round, K = 2 of M = 3; all train the gate, unless anchors alone do."""
    config = tiny(strategy__name=name, cohort__sampling=sampling)
    assert holders(config, "expert.0") == pytest.approx(count)
    assert holders(config, "gate") == 5
    assert holders(tiny(strategy__name="fedjets", gate__learns_from="anchors"), "gate") == 2


def test_running_statistics_stay_honest_unless_they_are_the_aim(tmp_path: Path) -> None:
    sent, trained = expert()
    whole = target_of(tmp_path, sent, trained)
    spec = VectorSpec(whole.spec.entries, len(sent) - 10)
    target = Target(whole.context, whole.name, sent, trained, spec, whole.generator)
    assert all(torch.equal(poison(target)[-10:], trained[-10:]) for poison in POISONS.values())
    assert not torch.equal(sign_flip(target)[:-10], trained[:-10])


def test_ruined_variances_are_positive_and_far_too_small_and_all_else_is_honest(tmp_path: Path) -> None:
    """Of an expert with batch norm: the server refuses a variance that is negative, and this one it must judge."""
    runtime = tiny_runtime(tmp_path, moe__trainable="all", attack__kind="ruined-statistics", attack__share=0.4)
    honest = FlatModel(build(runtime.architectures[0], 5))
    numbers = torch.rand(honest.spec.size, generator=torch.Generator().manual_seed(6)) + 0.5
    context = context_of(runtime, Job(0, {}), 1)
    attack = poisoning(ruined_statistics, lambda context, vectors: Update({"expert.1": numbers.clone()}))
    (ruined,) = attack(context, {"expert.1": torch.zeros(honest.spec.size)}).vectors.values()

    def named(vector: Tensor) -> dict[str, Tensor]:
        honest.load(vector)
        return {name: value.clone() for name, value in honest.module.state_dict().items()}

    before, after = named(numbers), named(ruined)
    variances = [name for name in before if name.endswith("running_var")]
    assert variances
    for name in variances:
        assert torch.equal(after.pop(name), RUINED * before[name])
        assert 0 < RUINED * float(before.pop(name).max()) < 0.01
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(name.endswith("running_mean") for name in after)


def test_labels_are_mirrored() -> None:
    assert flip(torch.tensor([0, 3, 9]), 10).tolist() == [9, 6, 0]


@pytest.mark.parametrize("rule", ["mean", "clip"])
def test_an_adaptive_attacker_goes_as_far_as_a_rule_clips(rule: str, tmp_path: Path) -> None:
    sent, trained = expert()
    target = target_of(tmp_path, sent, trained, aggregation__rule=rule, aggregation__clip_times=3.0)
    assert torch.allclose(adaptive(target), sent - 3.0 * (trained - sent), atol=1e-6)


def test_an_adaptive_attacker_that_is_judged_keeps_just_within_the_bound(tmp_path: Path) -> None:
    """It halves the length until the judge is content; gates are not judged."""
    sent, trained = expert()
    target = target_of(tmp_path, sent, trained, **JUDGED)
    runtime = target.context.runtime
    judge = Judge.of(runtime.config, runtime.task, runtime.common, runtime.architectures * 3)

    def reversed_by(length: float) -> Tensor:
        return sent - length * (trained - sent)

    longest = next(length for k in range(12) if judge.passes(1, reversed_by(length := 2.0 / 2**k), sent))
    assert 0.001 < longest < 2.0  # the judge sees the whole length
    assert torch.allclose(adaptive(target), reversed_by(longest), atol=1e-6)
    gate = start_vectors("gate")["gate"]
    assert torch.allclose(adaptive(target_of(tmp_path, gate, gate + 1, "gate", **JUDGED)), gate - 2.0, atol=1e-5)


@pytest.mark.parametrize("kind", [*POISONS, "forged-counts"])
@pytest.mark.parametrize(("name", "more"), [("ifca", {}), ("scaffold", {"scaffold__option": "I"})])
def test_attackers_of_every_method_attack(
    kind: str, name: str, more: dict[str, Scalar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that they chose themselves, too, and of what begins at zero and was not sent."""
    own: dict[str, Scalar] = {"run__rounds": 1, "limits__max_growth": 0.0, "limits__max_failure_share": 1.0, **more}
    tiny_run = TinyRunner(tmp_path, monkeypatch)
    honest = tiny_run(name, **own)
    poisoned = tiny_run(name, attack__kind=kind, attack__share=0.5, **own)
    (record,) = read_metrics(poisoned.config.run_dir)
    assert not any("Error" in why for why in record["failures"].values())
    changed = any(not torch.equal(poisoned.vectors[n], vector) for n, vector in honest.vectors.items())
    assert changed or kind == "ruined-statistics"  # linear experts have none
