"""A root of trust: what becomes of experts and gates on samples that no client holds."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from client_app.attacks import attackers
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.judge import Judge
from tests.support.faults import Runner, failures

PUBLIC: dict[str, Scalar] = {
    "strategy__name": "fedjets", "moe__trainable": "head", "partition__public_share": 0.3, "run__rounds": 6,
    "aggregation__rule": "validated", "limits__max_failure_share": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("validated"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


def test_the_judge_lets_an_expert_forget_a_prior_but_not_what_it_can_tell_apart(run: Runner) -> None:
    method = run(**PUBLIC | {"run__rounds": 1}).strategy
    start: Tensor = method.state()["expert.0"]
    judge = Judge.of(method.config, method.task, method.common, method.architectures)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    shifted, reversed_, noisy = start.clone(), -start, start + 10 * noise
    shifted[-10:] += torch.arange(10.0)  # a head's biases
    assert judge.loss(0, start) == pytest.approx(judge.common_loss)
    assert judge.loss(0, shifted) == pytest.approx(judge.common_loss, rel=1e-4)
    assert judge.passes(0, shifted, start)
    assert not judge.passes(0, reversed_, start)
    assert not judge.passes(0, noisy, start)
    assert judge.passes(0, reversed_, reversed_)  # what was bad before must only not get worse


def test_attackers_whose_experts_do_worse_are_refused_by_name_and_no_honest_client_is(run: Runner) -> None:
    found = run(**PUBLIC, attack__kind="sign-flip", attack__share=0.25)
    refused = {int(client) for record in failures(found) for client in record}
    assert refused
    assert refused <= attackers(found.config)
    assert any("on the public samples" in reason for record in failures(found) for reason in record.values())


def test_attackers_of_a_smaller_share_are_among_those_of_a_larger_one_and_anchors_are_among_them() -> None:
    def drawn(share: float, seed: int) -> frozenset[int]:
        flat: dict[str, Scalar] = {"attack.kind": "sign-flip", "attack.share": share, "run.seed": seed}
        return attackers(Config.from_flat(flat))

    for seed in range(5):
        few, more, most = drawn(0.1, seed), drawn(0.2, seed), drawn(0.4, seed)
        assert few < more < most
        assert (len(few), len(more), len(most)) == (2, 4, 8)
        assert [len([client for client in found if client < 5]) for found in (few, more, most)] == [1, 1, 2]


def test_the_rule_needs_public_samples() -> None:
    with pytest.raises(FedjetsError, match=r"partition\.public-share"):
        Config.from_flat({"aggregation.rule": "validated"})
