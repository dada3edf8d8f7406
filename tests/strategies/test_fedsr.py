"""FedSR: what its clients train, keep and send."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.algorithms import fedsr
from client_app.client import ClientContext
from client_app.queries import expert_probabilities
from client_app.runtime import Runtime
from client_app.state import TRAINED, ClientState
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.bottleneck import Bottleneck
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.representation import Reference
from fedjets_flwr.wire.messages import Job, Reply
from strategies.fedsr import FedSR
from tests.support.faults import OneClientANode, same, same_weights
from tests.support.runs import TinyRunner, tiny_run
from tests.support.spying import check_unsent, recording
from tests.support.tiny import common_expert, context_of, tiny, tiny_method

__all__ = ["tiny_run"]

FEW: dict[str, Scalar] = {"fedsr__steps": 3, "train__schedule": "constant", "train__lr": 0.1}


def runtime_of(folder: Path, **changes: Scalar) -> Runtime:
    config = tiny(strategy__name="fedsr", run__cache_dir=str(folder), **FEW | changes)
    method = tiny_method("fedsr", **FEW | changes).strategy
    return Runtime(config, common_expert(), [method.architecture(0)])


def context_at(runtime: Runtime, server_round: int = 1, client: int = 2) -> ClientContext:
    context = context_of(runtime, Job(client, ("expert.0",), ("expert.0",), {}), server_round)
    state = ClientState(runtime.config, f"{'a' * 32}/{'b' * 32}", client, (server_round, TRAINED))
    return ClientContext(runtime, context.job, server_round, context.data, state)


def start(**changes: Scalar) -> dict[str, Tensor]:
    return tiny_method("fedsr", **FEW | changes).strategy.state()


def by_hand(
    runtime: Runtime, vector: Tensor, order: Sequence[Tensor], server_round: int = 1, own: Tensor | None = None,
    buffers: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Weights, reference and mean loss after plain SGD with momentum and decay on the whole loss, written out."""
    config, context = runtime.config, context_at(runtime, server_round)
    model = runtime.new_expert(0, vector)
    net = model.module.train()
    head, reference = net[-1], Reference(10, 4)  # type: ignore[index]
    noise = context.generator("fedsr noise")
    parameters = [*model.parameters, *(reference.parameters() if config.fedsr.stochastic else ())]
    if own is not None:
        FlatModel(reference).load(own)
        parameters = [*model.parameters, *reference.parameters()]
    buffers = list(buffers) or [torch.zeros_like(p) for p in parameters]
    x, y, t = context.plain_inputs(), context.data.targets, config.train
    losses = []
    for rows in order:
        if config.fedsr.stochastic:
            mean, deviation = net[-2].moments(net[:-2](x(rows)))  # type: ignore[index, operator]
            z = mean + deviation * torch.randn(mean.shape, generator=noise)
            extra = config.fedsr.cmi * reference(mean, deviation, y[rows])
        else:
            z, extra = net[:-1](x(rows)), 0.0  # type: ignore[index, operator]
        loss = F.cross_entropy(head(z) + context.data.offset, y[rows]) + config.fedsr.l2 * z.norm(dim=1).mean() + extra
        losses.append(float(loss))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for p, g, b in zip(parameters, gradients, buffers, strict=True):
                full = (torch.zeros_like(p) if g is None else g) + t.weight_decay * p
                b.mul_(t.momentum).add_(full)
                p.sub_(t.lr * b)
    own = torch.cat([p.detach().flatten() for p in reference.parameters()])
    return model.vector, own, sum(losses) / len(losses)


@pytest.mark.parametrize("adjust", [False, True])
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("trainable", ["head", "stage"])
@pytest.mark.parametrize("steps", [9, 0])
def test_a_clients_steps_are_those_of_the_whole_loss(
    tmp_path: Path, steps: int, trainable: str, stochastic: bool, adjust: bool
) -> None:
    own: dict[str, Scalar] = {
        "fedsr__l2": 0.3, "fedsr__cmi": 0.2, "fedsr__steps": steps, "moe__trainable": trainable,
        "fedsr__stochastic": stochastic, "train__logit_adjust": adjust,
    }  # fmt: skip
    runtime, vectors = runtime_of(tmp_path, **own), start(**own)
    context = context_at(runtime)
    order = [rows for _, rows in zip(range(steps), context.order(epochs=9), strict=False)] or list(context.order())
    assert steps == 0 or steps > len(list(context.order()))
    assert len(order) == (steps or 2 * math.ceil(len(context.data) / 5))
    wanted, reference, loss = by_hand(runtime, vectors["expert.0"].clone(), order)
    found = fedsr.train(context, vectors)
    assert set(found.vectors) == {"expert.0"}
    torch.testing.assert_close(found.vectors["expert.0"], wanted, rtol=1e-4, atol=1e-5)
    assert set(found.state) == ({"reference"} if stochastic else set())
    if stochastic:
        torch.testing.assert_close(found.state["reference"], reference, rtol=1e-4, atol=1e-5)
    assert set(found.numbers) == {"num-examples", "loss"}
    assert found.numbers["num-examples"] == len(context.data)
    assert found.numbers["loss"] == pytest.approx(loss, rel=1e-4)
    assert not torch.equal(wanted, start(**own)["expert.0"])


def test_momentum_is_kept_by_the_client_where_the_settings_say_so(tmp_path: Path) -> None:
    own: dict[str, Scalar] = {"fedsr__l2": 0.3, "fedsr__cmi": 0.2, "train__momentum": 0.9}
    runtime, vectors = runtime_of(tmp_path, fedsr__keep_momentum=True, **own), start(**own)
    forgetting = runtime_of(tmp_path / "other", **own)
    first = fedsr.train(context_at(runtime), vectors)
    left, kept = first.vectors["expert.0"].clone(), {name: value.clone() for name, value in first.state.items()}
    assert set(kept) == {"reference", "momentum.0", "momentum.1"}
    assert kept["momentum.0"].any() and kept["momentum.1"].any()
    plain = fedsr.train(context_at(forgetting), vectors)
    assert same(plain.vectors["expert.0"], left) and set(plain.state) == {"reference"}
    context_at(runtime).keep(kept)
    second = fedsr.train(context_at(runtime, 2), {"expert.0": left})
    order = [rows for _, rows in zip(range(3), context_at(runtime, 2).order(epochs=3), strict=False)]
    model, reference = runtime.new_expert(0, left), FlatModel(Reference(10, 4))
    buffers = [*model.views(kept["momentum.0"].clone()), *reference.views(kept["momentum.1"].clone())]
    wanted, after, _ = by_hand(runtime, left.clone(), order, 2, kept["reference"], buffers)
    torch.testing.assert_close(second.vectors["expert.0"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.state["reference"], after, rtol=1e-4, atol=1e-5)
    context_at(forgetting).keep({"reference": kept["reference"]})
    without = fedsr.train(context_at(forgetting, 2), {"expert.0": left}).vectors["expert.0"]
    assert not torch.allclose(without, wanted, rtol=1e-3)


def test_only_sgds_momentum_can_be_kept() -> None:
    with pytest.raises(FedjetsError, match="fedsr.keep-momentum: train.optimizer = 'adam' has none"):
        FedSR.validate(
            tiny(strategy__name="fedsr", fedsr__keep_momentum=True, train__optimizer="adam", train__weight_decay=0.0)
        )


def test_its_experts_have_a_bottleneck_where_they_draw_and_all_clients_weigh_the_same() -> None:
    for stochastic, neck in ((True, "gaussian"), (False, "")):
        method = tiny_method("fedsr", fedsr__stochastic=stochastic).strategy
        assert method.architecture(0).neck == neck
        assert method.weight_of("expert.0", Reply(2, {}, {})) == 1.0


def test_a_client_goes_on_with_its_own_reference(tmp_path: Path) -> None:
    runtime, vectors = runtime_of(tmp_path), start()
    fresh = fedsr.train(context_at(runtime, 2), vectors).state["reference"].clone()
    context_at(runtime, 1).keep({"reference": torch.full_like(fresh, 0.5)})
    kept = fedsr.train(context_at(runtime, 2), vectors).state["reference"]
    assert not same(kept, fresh)
    assert float((kept - 0.5).abs().max()) < 0.2


def test_without_its_regularisers_the_reference_keeps_its_bits(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path, fedsr__l2=0.0, fedsr__cmi=0.0, train__weight_decay=0.0)
    found = fedsr.train(context_at(runtime), start()).state["reference"]
    assert same(found, FlatModel(Reference(10, 4)).vector)


def test_at_the_start_it_answers_as_the_common_expert(tmp_path: Path) -> None:
    runtime = runtime_of(tmp_path, fedsr__draws=0)
    context = context_at(runtime)
    probs = expert_probabilities(context, start())
    torch.testing.assert_close(probs[0], context.data.embedded.logits.softmax(1))


def test_answers_are_means_over_draws_of_their_own_generator(tmp_path: Path) -> None:
    def answers(draws: int, server_round: int = 1, client: int = 2) -> Tensor:
        context = context_at(runtime_of(tmp_path, fedsr__draws=draws), server_round, client)
        return expert_probabilities(context, wide)

    wide = start()
    module = runtime_of(tmp_path).new_expert(0, wide["expert.0"])
    neck = module.module[0]  # type: ignore[index]
    assert isinstance(neck, Bottleneck) and isinstance(neck.linear, nn.Linear)
    with torch.no_grad():
        neck.linear.bias[4:] = 1.0
    wide = {"expert.0": module.vector.clone()}
    assert same(answers(20), answers(20))
    assert not same(answers(20), answers(20, server_round=2))
    truth = answers(4000)
    few, many = ((answers(n) - truth).square().mean() for n in (1, 40))
    assert 10 < float(few / many) < 160  # variance falls as 1 / draws
    assert torch.allclose(answers(20).sum(dim=2), torch.ones(()), atol=1e-5)


@pytest.mark.runs
def test_without_bottleneck_and_regulariser_it_is_fedavg_with_equal_weights(tiny_run: TinyRunner) -> None:
    whole: dict[str, Scalar] = {"moe__trainable": "stage"}  # a head leaves its representation alone
    own: dict[str, Scalar] = whole | {"fedsr__stochastic": False, "fedsr__l2": 0.0, "fedsr__steps": 0}
    ours = tiny_run("fedsr", **own)
    assert same_weights(ours, tiny_run("fedavg", aggregation__weighting="equal", **whole))
    assert not same_weights(ours, tiny_run("fedavg", **whole))
    assert not same_weights(ours, tiny_run("fedsr", **own | {"fedsr__l2": 0.1}))


@pytest.mark.runs
def test_no_byte_of_a_reference_is_sent_and_clients_differ_in_it(tiny_run: TinyRunner, tmp_path: Path) -> None:
    grid = recording()
    run = tiny_run("fedsr", grid, **FEW)
    assert set(run.vectors) == {"expert.0"}
    assert run.vectors["expert.0"].numel() == 50 + 2 * 4 * 5
    files = sorted((tmp_path / "cache" / "private").rglob("*.safetensors"))
    assert files
    kept = {path.parent.parent.name: safetensors.torch.load(path.read_bytes())["reference"] for path in files}
    assert len({vector.numpy().tobytes() for vector in kept.values()}) == len(kept) > 2
    assert all(vector.numel() == 2 * 10 * 4 + 1 for vector in kept.values())
    check_unsent(grid, kept.values())


@pytest.mark.runs
@pytest.mark.parametrize("nodes", [2, 8])
def test_any_number_of_nodes_gives_the_same(tiny_run: TinyRunner, nodes: int) -> None:
    grid = type("Nodes", (OneClientANode,), {"nodes": nodes})
    ours, one = tiny_run("fedsr", grid, **FEW), tiny_run("fedsr", **FEW)
    assert same_weights(ours, one)
