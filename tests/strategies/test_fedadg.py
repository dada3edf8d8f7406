"""FedADG: what its clients train, keep and send, step by step."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client_app.algorithms import fedadg
from client_app.client import ClientContext
from client_app.runtime import Runtime
from client_app.state import TRAINED, ClientState
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.adversarial import Discriminator, Generator, label_input, seeded
from fedjets_flwr.seeds import derive
from fedjets_flwr.wire.messages import Job, Reply
from tests.support.faults import OneClientANode, same, same_weights
from tests.support.runs import TinyRunner, tiny_run
from tests.support.spying import check_unsent, recording
from tests.support.tiny import context_of, tiny_method, tiny_runtime

__all__ = ["tiny_run"]

SMALL: dict[str, Scalar] = {
    "moe__trainable": "all", "moe__init": "common", "fedadg__noise": 5, "fedadg__generator_hidden": 6,
    "fedadg__discriminator_hidden": 7, "fedadg__projection": 3,
    "fedadg__lr": 0.2, "train__schedule": "constant", "train__lr": 0.05, "train__batch_size": 4, "fedadg__alpha": 0.6,
    "fedadg__smoothing": 0.1, "fedadg__weight_decay": 0.01, "fedadg__warm_up_epochs": 2, "fedadg__epochs": 1,
}  # fmt: skip


def runtime_of(folder: Path, **changes: Scalar) -> Runtime:
    return tiny_runtime(folder, strategy__name="fedadg", **SMALL | changes)


def context_at(runtime: Runtime, server_round: int = 1, client: int = 2) -> ClientContext:
    context = context_of(runtime, Job(client, ("expert.0", "generator"), (), {}), server_round)
    state = ClientState(runtime.config, f"{'a' * 32}/{'b' * 32}", client, (server_round, TRAINED))
    return ClientContext(runtime, context.job, server_round, context.data, state)


def start(**changes: Scalar) -> dict[str, Tensor]:
    return tiny_method("fedadg", **SMALL | changes).strategy.state()


class Momentum:
    """SGD with momentum and decay, written out."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        self.parameters, self.lr, self.momentum, self.decay = parameters, lr, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in parameters]

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            for p, g, b in zip(self.parameters, gradients, self.buffers, strict=True):
                b.mul_(self.momentum).add_(g + self.decay * p)
                p.sub_(self.lr * b)


def by_hand(context: ClientContext, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Model, generator and discriminator after one plain epoch and one of the game."""
    config, how, data = context.config, context.config.fedadg, context.data
    model = context.runtime.new_expert(0, vectors["expert.0"])
    net = model.module
    body, head = net[:-1], net[-1]  # type: ignore[index]
    generator = FlatModel(Generator(5, 10, 6, 4))
    generator.load(vectors["generator"])
    critic = FlatModel(seeded(derive(config.run.seed, "discriminator", 2), Discriminator, (4, 10, 3, 7)))
    t = config.train
    mine = Momentum(model.parameters, t.lr, t.momentum, t.weight_decay)
    theirs = [Momentum(m.parameters, how.lr, how.momentum, how.weight_decay) for m in (critic, generator)]
    noise, inputs = context.generator("fedadg noise"), context.inputs()
    batches, losses = list(context.order(epochs=3)), []

    def ce(features: Tensor, rows: Tensor) -> Tensor:
        logs = (head(features) + data.offset).log_softmax(1)
        soft = torch.full((len(rows), 10), how.smoothing / 9)
        soft[torch.arange(len(rows)), data.targets[rows]] = 1 - how.smoothing
        losses.append(-(soft * logs).sum(1).mean())
        return losses[-1]

    net.train()
    for rows in batches[: 2 * len(batches) // 3]:
        mine.step(ce(body(inputs(rows)), rows))
    for rows in batches[2 * len(batches) // 3 :]:
        labels, n = label_input(data.targets[rows], 10), torch.rand(len(rows), 5, generator=noise)
        net.eval()
        h, fake = body(inputs(rows)).detach(), generator.module(n, labels).detach()
        d_fake, d_real = critic.module(fake, labels), critic.module(h, labels)
        theirs[0].step(((1 - d_fake) ** 2 + d_real**2).mean())
        net.train()
        h = body(inputs(rows))
        fooled = ((1 - critic.module(h, labels)) ** 2).mean()
        mine.step(how.alpha * ce(h, rows) + (1 - how.alpha) * fooled)
        theirs[1].step((critic.module(generator.module(n, labels), labels) ** 2).mean())
    loss = torch.stack(losses).mean().detach()
    return {"expert.0": model.vector, "generator": generator.vector, "discriminator": critic.vector, "loss": loss}


@pytest.mark.parametrize("adjust", [False, True])
def test_a_clients_steps_are_those_of_the_three_players(tmp_path: Path, adjust: bool) -> None:
    runtime, vectors = runtime_of(tmp_path, train__logit_adjust=adjust), start()
    wanted = by_hand(context_at(runtime), vectors)
    found = fedadg.train(context_at(runtime), vectors)
    assert set(found.numbers) == {"num-examples", "loss"}
    assert found.numbers["num-examples"] == len(context_at(runtime).data)
    assert found.numbers["loss"] == pytest.approx(float(wanted["loss"]), rel=1e-4)
    assert set(found.vectors) == {"expert.0", "generator"}
    for name, vector in {**found.vectors, "discriminator": found.state["discriminator"]}.items():
        torch.testing.assert_close(vector, wanted[name], atol=1e-5, rtol=1e-4)
    assert not torch.equal(vectors["generator"], found.vectors["generator"])


def test_a_client_goes_on_with_its_own_discriminator_and_its_momentum(tmp_path: Path) -> None:
    runtime, vectors = runtime_of(tmp_path), start()
    fresh = fedadg.train(context_at(runtime, 2), vectors).state
    fresh = {name: vector.clone() for name, vector in fresh.items()}
    for name in fresh:
        context_at(runtime, 1).keep({**fresh, name: fresh[name] + 0.25})
        kept = fedadg.train(context_at(runtime, 2), vectors).state
        assert not same(kept["discriminator"], fresh["discriminator"])
    context_at(runtime, 1).keep(fresh)
    later = fedadg.train(context_at(runtime, 2), vectors).state["discriminator"]
    other = fedadg.train(context_at(runtime, 2, client=3), vectors).state["discriminator"]
    assert not same(later, other)


def test_a_fixed_reference_is_never_sent_and_stays(tmp_path: Path) -> None:
    runtime, vectors = runtime_of(tmp_path, fedadg__reference="fixed"), start(fedadg__reference="fixed")
    assert set(vectors) == {"expert.0"}
    found = fedadg.train(context_at(runtime), vectors)
    assert set(found.vectors) == {"expert.0"}
    first = start()["generator"]
    game = fedadg._Game(context_at(runtime), vectors, 4)
    assert same(game.generator.vector, first)
    game.follow(game.draw(3), label_input(torch.tensor([1, 2, 3]), 10))
    assert same(game.generator.vector, first)


@pytest.mark.runs
@pytest.mark.parametrize("epochs", [(1, 1), (2, 0)])
def test_without_the_game_it_is_fedavg_with_equal_weights(tiny_run: TinyRunner, epochs: tuple[int, int]) -> None:
    """With alpha = 1 the discriminator and the generator play, and have no say."""
    plain: dict[str, Scalar] = SMALL | {"fedadg__warm_up_epochs": epochs[0], "fedadg__epochs": epochs[1]}
    plain |= {"fedadg__smoothing": 0.0, "fedadg__alpha": 1.0}
    ours, fedavg = (tiny_run(name, **plain, aggregation__weighting="equal") for name in ("fedadg", "fedavg"))
    assert same(ours.vectors["expert.0"], fedavg.vectors["expert.0"])
    moved = not torch.allclose(ours.vectors["generator"], ours.strategy.state()["generator"], atol=1e-6)
    assert moved == (epochs[1] > 0)
    assert not same(tiny_run("fedadg", **SMALL).vectors["expert.0"], ours.vectors["expert.0"])


@pytest.mark.runs
def test_no_discriminator_is_sent_and_clients_differ_in_theirs(tiny_run: TinyRunner, tmp_path: Path) -> None:
    grid = recording()
    run = tiny_run("fedadg", grid, **SMALL)
    assert set(run.vectors) == {"expert.0", "generator"}
    files = sorted((tmp_path / "cache" / "private").rglob("*.safetensors"))
    kept = {path.parent.parent.name: safetensors.torch.load(path.read_bytes()) for path in files}
    assert len({held["discriminator"].numpy().tobytes() for held in kept.values()}) == len(kept) > 2
    assert all(set(held) == {"discriminator", "momentum"} for held in kept.values())
    check_unsent(grid, [vector for held in kept.values() for vector in held.values()])


@pytest.mark.runs
@pytest.mark.parametrize("nodes", [2, 8])
def test_any_number_of_nodes_gives_the_same(tiny_run: TinyRunner, nodes: int) -> None:
    grid = type("Nodes", (OneClientANode,), {"nodes": nodes})
    assert same_weights(tiny_run("fedadg", grid, **SMALL), tiny_run("fedadg", **SMALL))


def test_no_epoch_at_all_is_refused() -> None:
    with pytest.raises(FedjetsError, match=r"fedadg\.warm-up-epochs \+ fedadg\.epochs = 0"):
        method = tiny_method("fedadg", **SMALL | {"fedadg__warm_up_epochs": 0, "fedadg__epochs": 0}).strategy
        method.validate(method.config)


def test_every_client_of_a_cohort_gets_both_and_all_weigh_the_same() -> None:
    for reference, names in (("learned", ("expert.0", "generator")), ("fixed", ("expert.0",))):
        method = tiny_method("fedadg", **SMALL | {"fedadg__reference": reference})
        jobs = method.planned(1, (), (2, 4))
        cost = {client: method.strategy.num_samples[client] for client in (2, 4)}
        assert jobs == [Job(client, names, names, cost=cost[client]) for client in (2, 4)]
        assert method.strategy.vectors_moved == len(names)
        assert method.strategy.weight_of("expert.0", Reply(2, {}, {})) == 1.0
        assert method.strategy.spec_of("generator").size == start()["generator"].numel()


def test_a_head_alone_has_no_features_to_train() -> None:
    with pytest.raises(FedjetsError, match=r"moe\.trainable = 'head': strategy\.name = 'fedadg'"):
        tiny_method("fedadg").strategy.validate(tiny_method("fedadg").strategy.config)


def test_gradients_of_one_player_reach_no_other(tmp_path: Path) -> None:
    game = fedadg._Game(context_at(runtime_of(tmp_path)), start(), 4)
    labels, noise = label_input(torch.tensor([1, 2, 3]), 10), game.draw(3)
    before = game.generator.vector.clone(), game.discriminator.vector.clone()
    game.tell_apart(F.relu(torch.randn(3, 4)), noise, labels)
    assert same(game.generator.vector, before[0])
    assert not same(game.discriminator.vector, before[1])
    told = game.discriminator.vector.clone()
    game.follow(noise, labels)
    assert same(game.discriminator.vector, told)
    assert not same(game.generator.vector, before[0])
