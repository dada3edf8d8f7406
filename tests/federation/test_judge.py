"""The judge on linear experts, whose loss on the public samples has a closed form."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.federation.validated import Validated
from fedjets_flwr.wire.messages import BadReply, Reply
from tests.support.tiny import CLASSES, FEATURES, HIDDEN, TinyMethod, common_expert, start_vectors, tiny_method

ROOT = 40
RULE: dict[str, Scalar] = {
    "aggregation__rule": "validated", "partition__public_share": 0.3, "aggregation__root_samples": ROOT,
}  # fmt: skip


@pytest.fixture
def method() -> TinyMethod:
    return tiny_method("fedjets", **RULE)


def judge_of(method: TinyMethod, **aggregation: float) -> Judge:
    strategy = method.strategy
    config = strategy.config
    changed = config.model_copy(update={"aggregation": config.aggregation.model_copy(update=aggregation)})
    return Judge.of(changed, strategy.task, strategy.common, strategy.architectures)


def public(method: TinyMethod) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, 4), common expert's logits (n, 10) and labels of the server's first samples."""
    held, common = method.strategy.task.samples(-1, part="public"), common_expert()
    assert len(held) > ROOT
    with torch.inference_mode():
        features = common.model[:-1](common.normalise(held.stored[:ROOT]))
        return features, common.model[-1](features), held.targets[:ROOT]


def outputs(features: Tensor, expert: Tensor) -> Tensor:
    split = FEATURES * CLASSES
    return features @ expert[:split].view(CLASSES, FEATURES).t() + expert[split:]


def centred(logits: Tensor, labels: Tensor) -> float:
    free = (logits - logits.mean(dim=0)).log_softmax(dim=1)
    return -sum(float(free[row, label]) for row, label in enumerate(labels.tolist())) / len(labels)


def gate_scores(logits: Tensor, gate: Tensor) -> Tensor:
    first, rest = gate[: CLASSES * HIDDEN].view(HIDDEN, CLASSES), gate[CLASSES * HIDDEN :]
    logits = F.layer_norm(logits, (CLASSES,))
    hidden, rest = torch.relu(logits @ first.t() + rest[:HIDDEN]), rest[HIDDEN:]
    count = len(rest) // (HIDDEN + 1)
    return torch.softmax(hidden @ rest[: HIDDEN * count].view(count, HIDDEN).t() + rest[HIDDEN * count :], dim=1)


def trained_on(method: TinyMethod, experts: Sequence[Tensor], gate: Tensor, steps: int) -> Tensor:
    """A gate after steps down the cross-entropy of the experts' probabilities, weighed by it."""
    features, logits, labels = public(method)
    probs = torch.stack([outputs(features.double(), expert.double()).softmax(dim=1) for expert in experts])
    gate = gate.double()
    for _ in range(steps):
        gate.requires_grad_()
        mixed = (gate_scores(logits.double(), gate).t().unsqueeze(2) * probs).sum(dim=0)
        (slope,) = torch.autograd.grad(F.nll_loss(mixed.log(), labels), gate)
        gate = (gate - method.strategy.config.gate.lr * slope).detach()
    return gate.float()


def test_a_judge_without_samples_is_refused(method: TinyMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would refuse everybody, and say that their experts are bad."""
    whole = method.strategy.task.samples(-1, part="public")
    monkeypatch.setattr(type(method.strategy.task), "samples", lambda self, client, part: whole.first(0))
    with pytest.raises(FedjetsError, match=r"aggregation.rule = 'validated': no public samples to judge by"):
        judge_of(method)


def test_the_loss_of_an_expert_is_that_without_its_prior(method: TinyMethod) -> None:
    judge, (features, logits, labels) = judge_of(method), public(method)
    vectors = start_vectors("expert.0", "expert.1")
    for expert, vector in enumerate(vectors.values()):
        assert judge.loss(expert, vector) == pytest.approx(centred(outputs(features, vector), labels), abs=1e-5)
    assert judge.common_loss == pytest.approx(centred(logits, labels), abs=1e-5)
    assert judge.common_loss != pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-3)


def scaled_to(judge: Judge, method: TinyMethod, wanted: float, start: Tensor) -> Tensor:
    """An expert of a wanted loss, on the way from one that says nothing (log 10) to a bad one."""
    low, high = 0.0, 1.0
    assert math.log(CLASSES) < wanted < judge.loss(0, start)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if judge.loss(0, middle * start) < wanted else (low, middle)
    return low * start


@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_an_expert_may_fall_a_share_behind_the_common_expert_or_stay_as_it_was(
    method: TinyMethod, tolerance: float
) -> None:
    judge = judge_of(method, tolerance=tolerance)
    bad = 30 * start_vectors("expert.0")["expert.0"]
    allowed = (1 + tolerance) * judge.common_loss
    just, over = (scaled_to(judge, method, allowed * factor, bad) for factor in (0.999, 1.001))
    good, worse = 0.0 * bad, scaled_to(judge, method, allowed * 1.01, bad)
    assert judge.loss(0, good) < allowed
    assert judge.passes(0, just, good)
    assert not judge.passes(0, over, good)
    assert judge.passes(0, over, worse)
    assert not judge.passes(0, worse, over)
    assert not judge.passes(0, over, good)  # what it was is looked at anew


def test_a_reply_with_a_bad_expert_is_refused_by_the_experts_name(method: TinyMethod) -> None:
    judge = judge_of(method)
    state = start_vectors("expert.0", "expert.2", "gate")
    state = {name: 0 * vector for name, vector in state.items()}
    bad = 30 * start_vectors("expert.2")["expert.2"]

    def reply(**vectors: Tensor) -> Reply:
        return Reply(1, {name.replace("_", "."): vector for name, vector in vectors.items()}, {})

    judge.check(reply(expert_0=state["expert.0"], expert_2=state["expert.2"], gate=100 + state["gate"]).vectors, state)
    judge.check(reply(expert_1=bad).vectors, state)  # not one that it was sent; other checks see to it
    with pytest.raises(BadReply, match=r"^expert\.2 does worse than it did, and than the common expert"):
        judge.check(reply(expert_0=state["expert.0"], expert_2=bad).vectors, state)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_server_trains_the_gate_among_all_experts_on_its_own_samples(method: TinyMethod, steps: int) -> None:
    vectors = start_vectors("expert.0", "expert.1", "expert.2", "gate")
    vectors["expert.1"] = 0 * vectors["expert.1"]
    before = {name: vector.clone() for name, vector in vectors.items()}
    found = judge_of(method, gate_steps=steps).train_gate(vectors)
    by_hand = trained_on(method, [vectors[f"expert.{m}"] for m in range(3)], vectors["gate"], steps)
    assert torch.allclose(found, by_hand, atol=1e-5)
    assert bool(steps) != torch.equal(found, vectors["gate"])
    assert all(torch.equal(vectors[name], vector) for name, vector in before.items())


def test_a_round_clips_the_updates_and_trains_its_gate_on(method: TinyMethod) -> None:
    old = start_vectors("expert.0", "expert.1", "expert.2", "gate")
    judge = judge_of(method, gate_steps=3)
    settings = judge.config.aggregation
    generator = torch.Generator().manual_seed(4)
    steps = [size * torch.randn(old["gate"].shape, generator=generator) for size in (0.01, 0.02, 4.0, 0.03)]
    move = 0.01 * torch.ones(old["expert.1"].shape)
    rule = Validated(old, settings, judge)
    rule.add("expert.1", old["expert.1"] + move, 1.0)
    for step in steps:
        rule.add("gate", old["gate"] + step, 1.0)
    found = rule.result()

    bound = settings.clip_times * float(steps[1].norm())
    mean = torch.stack([step * min(1.0, bound / float(step.norm())) for step in steps]).mean(dim=0)
    experts = [old["expert.0"], old["expert.1"] + move, old["expert.2"]]
    assert set(found) == {"expert.1", "gate"}
    assert torch.allclose(found["expert.1"], experts[1], atol=1e-6)
    assert torch.allclose(found["gate"], trained_on(method, experts, old["gate"] + mean, 3), atol=1e-5)
    assert rule.counts == {"expert.1": 1, "gate": 4}


def test_a_round_whose_gate_nobody_trained_leaves_it(method: TinyMethod) -> None:
    old = start_vectors("expert.0", "expert.1", "expert.2", "gate")
    judge = judge_of(method)
    rule = Validated(old, judge.config.aggregation, judge)
    rule.add("expert.1", old["expert.1"] + 1, 1.0)
    assert set(rule.result()) == {"expert.1"}


def test_rounds_refuse_what_the_judge_does_and_average_by_its_rule(method: TinyMethod) -> None:
    size = FEATURES * CLASSES + CLASSES
    start = method.vectors
    bad = Reply(0, {"expert.0": 1e2 * torch.randn(size)}, {"num-examples": method.strategy.num_samples[0], "loss": 1.0})
    good = Reply(1, {"expert.0": start["expert.0"]}, {"num-examples": method.strategy.num_samples[1], "loss": 1.0})
    found = method.refused(bad, good)
    assert set(found) == {0}
    assert "on the public samples" in found[0]
    assert set(method.rounds.watch.seconds) == {"judge"}
    step, (far, near) = torch.zeros(start["gate"].shape), (1e3, 1e-3)
    step[-1] = 1.0
    replies = [
        Reply(client, {"gate": start["gate"] + size * step}, {"num-examples": 1, "loss": 1.0})
        for client, size in ((0, near), (1, near), (2, far))
    ]
    before = start["gate"]
    method.merged(replies)
    # Clipped to two medians, and not averaged as it is; what is more is the server's own steps.
    assert float((method.vectors["gate"] - before).norm()) < 1
    assert isinstance(method.rounds.aggregator(), Validated)


def test_rounds_judge_by_this_rule_alone(method: TinyMethod) -> None:
    assert method.rounds._judge is not None
    assert tiny_method("fedjets").rounds._judge is None


def test_a_model_that_its_client_chose_itself_is_judged_too() -> None:
    method = tiny_method("ifca", **RULE)
    own = {
        client: {"num-examples": method.strategy.num_samples[client], "loss": 1.0, "cluster": 1} for client in (3, 4)
    }
    bad = Reply(3, {"trained": 1e2 * torch.randn(FEATURES * CLASSES + CLASSES)}, own[3])
    found = method.refused(bad, Reply(4, {"trained": method.vectors["expert.1"]}, own[4]))
    assert set(found) == {3}
    assert found[3].startswith("expert.1 does worse")
