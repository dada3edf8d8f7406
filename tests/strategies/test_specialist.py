"""A specialist beside the generalist: who is asked for what, what travels, and what stays (Listo Zec et al. 2020)."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import torch
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from client_app.algorithms import specialist
from client_app.client import ClientContext
from client_app.node import read_node
from client_app.participants import fit_own, own_start
from client_app.policy import Refused
from client_app.site import open_site
from client_app.state import ADAPTED, ClientState
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import ClientData, open_client
from fedjets_flwr.data.consent import opted_out
from fedjets_flwr.data.datasets import Images
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import build
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.early_stopping import Stopped, mean_loss
from fedjets_flwr.moe.specialist import NLL, SpecialistMixture, build_mixture, log_mixture, total_nll
from fedjets_flwr.runs.run_folder import read_recorded
from fedjets_flwr.runs.tracking import read_metrics
from fedjets_flwr.seeds import derive
from fedjets_flwr.tasks import image_classification
from fedjets_flwr.wire.messages import Job, encode_request
from tests.support.faults import OneClientANode, same, same_weights
from tests.support.in_process import configure
from tests.support.runs import TinyRunner, participants, tiny_run
from tests.support.sites import SiteGrid
from tests.support.spying import check_unsent, recording
from tests.support.tiny import context_of, start_vectors, tiny, tiny_runtime

__all__ = ["tiny_run"]

OWN: dict[str, Scalar] = {
    "partition__name": "majority", "partition__samples_per_client": 40, "partition__val_share": 0.25,
    "partition__test_share": 0.25, "partition__majority_share": 0.8, "train__schedule": "constant", "adapt__lr": 0.02,
    "adapt__max_epochs": 6, "specialist__lr": 0.03,
}  # fmt: skip
HALF: dict[str, Scalar] = {"partition__opt_out": 0.45}
"""Three of seven."""


def gate_of(context: ClientContext) -> torch.nn.Module:
    """Return a client's gate at its start."""
    config = context.config
    seed = derive(config.run.seed, "specialist's gate", context.client)
    return build_mixture(context.runtime.architecture(0), config.moe.trainable, config.specialist, seed).gate


# The rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.runs
def test_the_generalist_of_all_is_fedavgs(tiny_run: TinyRunner) -> None:
    ours, plain = tiny_run("specialist", **OWN), tiny_run("fedavg", **OWN)
    assert same_weights(ours, plain)
    a, b = (read_recorded(run.config.run_dir).results for run in (ours, plain))
    assert all(a[name] == b[name] for name in ("bytes_down", "bytes_up", "bytes_served", "accuracy"))
    assert participants(ours)["local"] != participants(plain)["local"]
    assert 0 < participants(ours)["specialist-share"] < 1


@pytest.mark.runs
def test_who_opted_out_is_asked_for_nothing_but_to_score_its_own_mixture(tiny_run: TinyRunner) -> None:
    grid = recording()
    run = tiny_run("specialist", grid, **OWN | HALF)
    out = opted_out(run.config)
    assert len(out) == 3
    for kind, clients in grid.asked:
        if kind != "evaluate.specialist":
            assert out.isdisjoint(clients), kind
    scored = [clients for kind, clients in grid.asked if kind == "evaluate.specialist"]
    assert sorted(itertools.chain(*scored)) == list(range(7))
    for record in read_metrics(run.config.run_dir):
        assert out.isdisjoint(record["cohort"])
        assert len(record["cohort"]) == 4  # five are asked for, four take part
        assert record["failures"] == {}
    assert set(participants(run)["clients"]) == {str(client) for client in range(7)}


def noise_for(replaced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace images as ``replaced(config, client, part, data)`` says: a mask of them, (n,)."""

    def opened(config: Config, client: int, folder: Path | None = None, part: str = "train") -> ClientData:
        data = open_client(config, client, folder, part)
        mask, pixels = replaced(config, client, part, data), data.images.pixels.clone()
        generator = torch.Generator().manual_seed(client)
        noise = torch.randint(256, pixels.shape, generator=generator).to(pixels.dtype)
        pixels[mask] = noise[mask]
        return ClientData(client, Images(pixels, data.images.labels, data.images.domains), data.training)

    monkeypatch.setattr(image_classification, "open_client", opened)


def check_nothing_told(tiny_run: TinyRunner, replaced: Any, monkeypatch: pytest.MonkeyPatch, **own: Scalar) -> None:
    """The generalist's bits, the cohorts and all that the rounds move are the same whatever those images are."""
    before, after = recording(), recording()
    # Each with a cache of its own, or the second would tell that it had nothing to compute.
    caches = [str(tiny_run.folder / name) for name in ("before", "after")]
    run = tiny_run("specialist", before, **OWN | own, run__cache_dir=caches[0])
    noise_for(replaced, monkeypatch)
    again = tiny_run("specialist", after, **OWN | own, run__cache_dir=caches[1])
    assert same_weights(run, again)
    assert before.heard == after.heard
    assert before.asked == after.asked
    a, b = (read_metrics(r.config.run_dir) for r in (run, again))
    for one, two in zip(a, b, strict=True):
        assert all(one[name] == two[name] for name in ("cohort", "bytes_down", "bytes_up", "loss"))
    assert participants(run)["clients"] != participants(again)["clients"]  # it was noise that they adapted to


@pytest.mark.runs
def test_noise_in_place_of_an_opted_out_clients_images_changes_no_bit_of_the_federation(
    tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(config: Config, client: int, part: str, data: ClientData) -> torch.Tensor:
        return torch.full((len(data.images),), client in opted_out(config) and part != "test")

    check_nothing_told(tiny_run, replaced, monkeypatch, **HALF)


@pytest.mark.runs
def test_noise_in_place_of_private_images_changes_no_bit_of_the_federation(
    tiny_run: TinyRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(config: Config, client: int, part: str, data: ClientData) -> torch.Tensor:
        if part != "train" or client >= config.partition.clients:
            return torch.zeros(len(data.images), dtype=torch.bool)
        shared = {bytes(image.numpy()) for image in open_client(config, client, part="shared").images.pixels}
        return torch.tensor([bytes(image.numpy()) not in shared for image in data.images.pixels])

    check_nothing_told(tiny_run, replaced, monkeypatch, partition__private_share=0.5)


@pytest.mark.runs
def test_where_all_opt_out_the_generalist_stays_and_mixtures_still_learn(tiny_run: TinyRunner) -> None:
    alone: dict[str, Scalar] = OWN | {"partition__opt_out": 1.0, "adapt__max_epochs": 30}
    run, plain = tiny_run("specialist", **alone), tiny_run("fedavg", **alone)
    assert same(run.vectors["expert.0"], run.strategy.state()["expert.0"])
    assert [record["cohort"] for record in read_metrics(run.config.run_dir)] == [[], [], []]
    assert participants(run)["local"] > participants(plain)["local"] + 0.1
    assert participants(run)["specialist-share"] > 0.5


@pytest.mark.runs
def test_a_site_opts_out_by_its_own_node_config(tiny_run: TinyRunner) -> None:
    """As if the settings of a simulation said so; its SuperNode refuses whatever else it is asked."""
    simulated = tiny_run("specialist", **OWN | HALF)
    out = opted_out(simulated.config)

    class Sites(SiteGrid):
        def begin(self) -> None:
            for client in out:
                self.sites[100 + client].config["opt-out"] = True

    run = tiny_run("specialist", Sites, **OWN)
    assert same_weights(run, simulated)
    assert participants(run) == participants(simulated)
    kinds = {kind for node, kind in SiteGrid.latest.kinds if node - 100 in out}
    assert kinds == {"query.describe", "evaluate.specialist"}


@pytest.mark.runs
def test_a_site_that_opts_out_meanwhile_is_asked_for_nothing_more(tiny_run: TinyRunner) -> None:
    """It restarts with another node config in the middle of the run; if it were asked, it would refuse."""

    class Withdrawing(SiteGrid):
        def get_nodes(self) -> Iterable[NodeInfo]:
            if len(self.kinds) > 24 and 104 in self.sites:
                self.sites[204] = self.sites.pop(104)
                self.sites[204].config["opt-out"] = True
            return super().get_nodes()

    everybody: dict[str, Scalar] = {"cohort__anchors": 3, "cohort__normals": 4, "run__rounds": 4}
    run = tiny_run("fedavg", Withdrawing, **OWN | everybody)
    records = read_metrics(run.config.run_dir)
    assert 4 in records[0]["cohort"]
    assert all(4 not in record["cohort"] for record in records[1:])
    assert all(record["failures"] == {} for record in records)
    assert {kind for node, kind in SiteGrid.latest.kinds if node == 204} == {"query.describe", "evaluate.fedavg"}
    assert set(participants(run)["clients"]) == {str(client) for client in range(7)}


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["query.prepare", "train.fedavg", "evaluate"])
def test_a_site_that_opted_out_refuses_to_take_part_and_notes_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, monkeypatch)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    request = encode_request(1, {}, [Job(1)], {})
    context = Context(1, 1, {"client-id": 1}, RecordDict(), config.flat())
    node = read_node({"client-id": 1, "opt-out": True}, config, False)
    with pytest.raises(Refused, match="opt-out = true: it takes part in no round"):
        open_site(Message(request, 1, kind), context, config, node)
    lines = (tmp_path / "cache" / "audit.jsonl").read_text().splitlines()
    assert ["asked" in lines[0], "refused" in lines[1]] == [True, True]


@pytest.mark.runs
def test_a_gate_is_not_asked_for_the_experts_of_who_opted_out(tiny_run: TinyRunner) -> None:
    run = tiny_run("fedjets", **OWN | {"partition__opt_out": 0.3, "partition__public_share": 0.2})
    out = {str(client) for client in opted_out(run.config)}
    assert set(participants(run)["clients"]) == {str(client) for client in range(7)} - out
    failed = read_metrics(run.config.run_dir)[-1]["failures"]
    assert failed == dict.fromkeys(sorted(out), "it opted out: the gate is not asked for its experts")


@pytest.mark.runs
def test_with_noise_who_takes_no_part_is_drawn_and_not_asked(tiny_run: TinyRunner) -> None:
    """So the others are drawn as often as is told, whoever opts out, at the start or on the way."""

    class Sites(SiteGrid):
        def begin(self) -> None:
            self.sites[104].config["opt-out"] = True

    pytest.importorskip("dp_accounting")
    noisy: dict[str, Scalar] = OWN | {"privacy__noise_multiplier": 1.0, "privacy__delta": 1e-3}
    some, all_ = (tiny_run("fedavg", grid, **noisy) for grid in (Sites, SiteGrid))
    drawn, asked = ([record["cohort"] for record in read_metrics(run.config.run_dir)] for run in (all_, some))
    assert any(4 in cohort for cohort in drawn)
    assert asked == [[client for client in cohort if client != 4] for cohort in drawn]
    told = [read_recorded(run.config.run_dir).results["privacy"] for run in (some, all_)]
    assert told[0] == told[1]


def test_opt_out_is_for_clients_that_train() -> None:
    with pytest.raises(FedjetsError, match="--node-config: opt-out=true: client 8 never trains anyway"):
        read_node({"client-id": 8, "opt-out": True}, tiny(), False)


def test_opt_out_is_true_or_false() -> None:
    with pytest.raises(FedjetsError, match=r"--node-config: opt-out='yes' is neither true nor false"):
        read_node({"client-id": 1, "opt-out": "yes"}, tiny(), False)


# The mixtures ---------------------------------------------------------------------------------------------------------


def asked(folder: Path, client: int = 2, server_round: int = 1, **changes: Scalar) -> ClientContext:
    runtime = tiny_runtime(folder, **OWN | changes)
    context = context_of(runtime, Job(client, ("expert.0",), (), {"reading": 0}), server_round)
    state = ClientState(runtime.config, f"{'a' * 32}/{'b' * 32}", client, (server_round, ADAPTED))
    return ClientContext(runtime, context.job, server_round, context.data, state)


def nll(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.nll_loss(scores, targets, reduction="sum")


@pytest.mark.parametrize("gate", ["network", "head"])
def test_without_an_epoch_a_mixture_is_the_generalist(gate: str, tmp_path: Path) -> None:
    vectors = start_vectors("expert.0")
    context = asked(tmp_path, adapt__max_epochs=0, specialist__trains="gate", specialist__gate=gate)
    made = specialist.adapt(context, vectors)
    alone = context.expert(0, vectors["expert.0"]).module.eval()
    with torch.inference_mode():
        wanted = alone(context.plain_inputs()(torch.arange(len(context.data)))).softmax(1)
    torch.testing.assert_close(made.predict(context), wanted)
    assert made.numbers == {"specialist-share": 0.5}


def test_what_comes_out_depends_on_generalist_client_and_seed_and_on_no_round(tmp_path: Path) -> None:
    def made(client: int = 2, server_round: int = 1, **changes: Scalar) -> torch.Tensor:
        context = asked(tmp_path, client, server_round, **changes)
        return specialist.adapt(context, start_vectors("expert.0")).state["mixture"].clone()

    assert same(made(), made(server_round=5))
    assert not same(made(), made(client=3))
    assert not same(made(), made(run__seed=2))


@pytest.mark.parametrize("trains", ["gate", "gate+local", "all"])
def test_a_mixture_begins_with_the_fine_tuned_model_and_only_gets_better(
    trains: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept weights are those of the lowest validation loss, and the generalist's own are as they were sent."""
    context = asked(tmp_path, specialist__trains=trains)
    vectors = start_vectors("expert.0")
    sent = vectors["expert.0"].clone()
    val, trained, hows = context.on("val"), list[FlatModel](), list[Any]()

    def noting(context: ClientContext, model: FlatModel, *rest: Any) -> Stopped:
        trained.append(model)
        hows.append(rest)
        return fit_own(context, model, *rest)

    monkeypatch.setattr(specialist, "fit_own", noting)
    made = specialist.adapt(context, vectors)
    assert hows == [(), (0.03, NLL)]
    with torch.inference_mode():
        test = context.on("test")
        shares = trained[1].module.eval().shares(test.plain_inputs()(torch.arange(len(test.data))))  # type: ignore[operator]
    assert made.numbers == {"specialist-share": pytest.approx(float(shares.mean()), abs=1e-6)}
    assert 0.01 < made.numbers["specialist-share"] < 0.99
    model: Any = trained[1]
    stopped_at = mean_loss(model, val.plain_inputs(), val.data.targets, nll)
    assert same(vectors["expert.0"], sent)
    generalist = torch.cat([p.flatten() for p in model.module.shared.parameters()])
    assert torch.equal(generalist, sent) == (trains != "all")
    tuned = context.copy(0, sent)
    fit_own(context, tuned)
    local = torch.cat([p.flatten() for p in model.module.local.parameters()])
    assert torch.equal(local, tuned.vector) == (trains == "gate")
    half = SpecialistMixture(gate_of(context), tuned.module, context.copy(0, sent).module, log_mixture, ()).eval()
    with torch.inference_mode():
        inputs = val.plain_inputs()(torch.arange(len(val.data)))
        before = float(nll(half(inputs), val.data.targets)) / len(val.data)
    assert stopped_at < before


def test_the_sum_of_losses_says_when_to_stop() -> None:
    scores, targets = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), torch.tensor([1, 0])
    assert total_nll(scores, targets).item() == 6.0


def test_a_gate_is_a_network_of_the_experts_shape_or_one_unit_and_each_clients_own(tmp_path: Path) -> None:
    def gate(how: str, client: int = 2, trainable: str = "all", seed: int = 1) -> torch.nn.Module:
        changes: dict[str, Scalar] = {"specialist__gate": how, "moe__trainable": trainable, "run__seed": seed}
        return gate_of(asked(tmp_path, client, **changes))

    network = gate("network")
    assert [name for name, _ in network.named_children()] == ["layer1", "layer2", "pool", "head"]
    *_, last = network.modules()
    assert isinstance(last, torch.nn.Linear) and last.out_features == 1
    assert not last.weight.any() and not last.bias.any()
    architecture = asked(tmp_path, moe__trainable="all").runtime.architecture(0)
    wanted = build(replace(architecture, num_classes=1), derive(1, "specialist's gate", 2))
    for (name, weight), other in zip(network.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(weight, other) or name.startswith("head")
    first = [next(iter(gate("network", *at).parameters())) for at in ((2,), (3,), (2, "all", 5))]
    assert len({tensor.detach().numpy().tobytes() for tensor in first}) == 3
    for unit, features in ((gate("head"), 32), (gate("head", 2, "head"), 4), (gate("network", 2, "head"), 4)):
        assert isinstance(unit, torch.nn.Linear) and (unit.in_features, unit.out_features) == (features, 1)


def test_a_specialist_from_scratch_begins_as_the_local_model_does(tmp_path: Path) -> None:
    context = asked(tmp_path, specialist__start="scratch", specialist__trains="gate")
    made = specialist.adapt(context, start_vectors("expert.0"))
    own = own_start(context)
    fit_own(context, own)
    assert torch.equal(made.state["mixture"][-100:-50], own.vector) or own.vector.tolist() in [
        made.state["mixture"][i : i + 50].tolist() for i in range(len(made.state["mixture"]) - 49)
    ]


@pytest.mark.runs
@pytest.mark.parametrize("nodes", [2, 8])
def test_any_number_of_nodes_gives_the_same(tiny_run: TinyRunner, nodes: int) -> None:
    grid = type("Nodes", (OneClientANode,), {"nodes": nodes})
    assert participants(tiny_run("specialist", grid, **OWN)) == participants(tiny_run("specialist", **OWN))


@pytest.mark.runs
def test_no_byte_of_a_mixture_is_sent(tiny_run: TinyRunner, tmp_path: Path) -> None:
    grid = recording()
    run = tiny_run("specialist", grid, **OWN)
    files = sorted((tmp_path / "cache" / "private").rglob("*.safetensors"))
    assert len(files) == 7
    sent = {bytes(run.vectors["expert.0"][i : i + 2].numpy()) for i in range(49)}
    mixtures = [safetensors.torch.load(path.read_bytes())["mixture"] for path in files]
    check_unsent(grid, mixtures, sent)  # but for the generalist, which is in each


@pytest.mark.parametrize("part", ["val", "test"])
def test_it_needs_parts_of_its_clients_own(tiny_run: TinyRunner, part: str) -> None:
    with pytest.raises(FedjetsError, match=rf"partition.{part}-share = 0: strategy.name = 'specialist'"):
        tiny_run("specialist", **OWN | {f"partition__{part}_share": 0.0})
