"""The judge on linear experts, whose loss on the public samples has a closed form."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedjets_flwr.config.schema import Scalar
from fedjets_flwr.federation.judge import Judge
from fedjets_flwr.federation.validated import Validated, harmless
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


def mixture(method: TinyMethod, experts: Sequence[Tensor], gate: Tensor) -> float:
    """Cross-entropy of the experts' probabilities, weighed by the gate."""
    features, logits, labels = public(method)
    probs = torch.stack([outputs(features.double(), expert.double()).softmax(dim=1) for expert in experts])
    mixed = (gate_scores(logits.double(), gate.double()).t().unsqueeze(2) * probs).sum(dim=0)
    return float(F.nll_loss(mixed.log(), labels))


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

    judge.check(reply(expert_0=state["expert.0"], expert_2=state["expert.2"], gate=100 + state["gate"]), state)
    judge.check(reply(expert_1=bad), state)  # not one that it was sent; other checks see to it
    with pytest.raises(BadReply, match=r"^expert\.2 does worse than it did, and than the common expert"):
        judge.check(reply(expert_0=state["expert.0"], expert_2=bad), state)


def test_the_loss_of_a_gate_is_that_of_the_mixture_of_all_experts(method: TinyMethod) -> None:
    vectors = start_vectors("expert.0", "expert.1", "expert.2", "gate")
    experts = [vectors[f"expert.{m}"] for m in range(3)]
    loss = judge_of(method).gate_loss(vectors)
    assert loss(vectors["gate"]) == pytest.approx(mixture(method, experts, vectors["gate"]), rel=1e-4)
    other = vectors["gate"].flip(0)
    assert loss(other) == pytest.approx(mixture(method, experts, other), rel=1e-4)


def test_a_round_leaves_out_the_gates_that_harm_and_clips_the_rest(method: TinyMethod) -> None:
    """Expert 2 is worse than one that says nothing. Three gates turn to expert 0, one, far out, to expert 2."""
    old = start_vectors("expert.0", "expert.1", "expert.2", "gate")
    old |= {"expert.0": 0 * old["expert.0"], "expert.2": 5 * old["expert.2"], "gate": 0.1 * old["gate"]}
    judge = judge_of(method)
    settings = judge.config.aggregation
    generator = torch.Generator().manual_seed(4)
    steps = [0.01 * torch.randn(old["gate"].shape, generator=generator) for _ in range(4)]
    for step, (expert, size) in zip(steps, [(-3, 1.0), (-3, 1.1), (-1, 40.0), (-3, 0.9)], strict=True):
        step[expert] += size
    rule = Validated(old, settings, judge)
    move = 0.01 * torch.ones(old["expert.1"].shape)
    rule.add("expert.1", old["expert.1"] + move, 1.0)
    for step in steps:
        rule.add("gate", old["gate"] + step, 1.0)
    found = rule.result()

    bound = settings.clip_times * float(torch.stack([step.norm() for step in steps]).sort().values[1])
    clipped = [step * min(1.0, bound / float(step.norm())) for step in steps]
    experts = [old["expert.0"], old["expert.1"] + move, old["expert.2"]]

    def gate(rows: Sequence[int]) -> Tensor:
        return old["gate"] + torch.stack([clipped[row] for row in rows]).mean(dim=0)

    kept = harmless(lambda rows: mixture(method, experts, gate(rows)), len(steps), settings.gate_margin)
    assert kept == [0, 1, 3]
    assert set(found) == {"expert.1", "gate"}
    assert torch.allclose(found["expert.1"], experts[1], atol=1e-6)
    assert torch.allclose(found["gate"], gate(kept), atol=1e-5)
    assert rule.counts == {"expert.1": 1, "gate": len(kept)}


def test_rounds_refuse_what_the_judge_does_and_average_by_its_rule(method: TinyMethod) -> None:
    size = FEATURES * CLASSES + CLASSES
    start = method.vectors
    bad = Reply(0, {"expert.0": 1e2 * torch.randn(size)}, {"num-examples": method.strategy.num_samples[0], "loss": 1.0})
    good = Reply(1, {"expert.0": start["expert.0"]}, {"num-examples": method.strategy.num_samples[1], "loss": 1.0})
    found = method.refused(bad, good)
    assert set(found) == {0}
    assert "on the public samples" in found[0]
    assert set(method.rounds.seconds) == {"judge"}
    step, (far, near) = torch.zeros(start["gate"].shape), (1e3, 1e-3)
    step[-1] = 1.0
    replies = [
        Reply(client, {"gate": start["gate"] + size * step}, {"num-examples": 1, "loss": 1.0})
        for client, size in ((0, near), (1, near), (2, far))
    ]
    before = start["gate"]
    method.merged(replies)
    # Clipped to two medians, and not averaged as it is.
    assert float((method.vectors["gate"] - before).norm()) <= 2 * near
    assert isinstance(method.rounds.aggregator(), Validated)


def test_rounds_judge_by_this_rule_alone(method: TinyMethod) -> None:
    assert method.rounds._judge is not None
    assert tiny_method("fedjets").rounds._judge is None
