"""Identities between methods, bit by bit, and what every method must come with."""

from pathlib import Path

import pytest
import torch

import strategies
from fedjets_flwr.config.sections import Train
from fedjets_flwr.config.sources import read_preset
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.runs.tracking import read_metrics
from strategies.scaffold import effective_steps, option_two
from tests.support.faults import same
from tests.support.in_process import Finished
from tests.support.methods import OF_TEXT, TRAINED
from tests.support.runs import Run, run
from tests.support.started import finish

__all__ = ["run"]

ROOT = Path(__file__).resolve().parents[2]


def test_fedprox_without_mu_is_fedavg(run: Run) -> None:
    fedavg, fedprox = run("fedavg"), run("fedprox", fedprox__mu=0.0)
    assert same(fedavg.vectors["expert.0"], fedprox.vectors["expert.0"])
    assert not same(fedavg.vectors["expert.0"], run("fedprox", fedprox__mu=0.1).vectors["expert.0"])


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_in_round_one_is_fedavg(run: Run, option: str) -> None:
    one = {"run__rounds": 1, "train__momentum": 0.0}
    fedavg, scaffold = run("fedavg", **one), run("scaffold", scaffold__option=option, **one)
    assert same(fedavg.vectors["expert.0"], scaffold.vectors["expert.0"])
    more = {"run__rounds": 6, "train__momentum": 0.0}
    assert not same(
        run("fedavg", **more).vectors["expert.0"], run("scaffold", scaffold__option=option, **more).vectors["expert.0"]
    )


def test_scaffolds_variates_average_to_the_servers(run: Run) -> None:
    """c = mean over all N clients of c_i, from zero on: each round adds |S|/N mean_S (c_i+ - c_i) to both."""
    scaffold = run("scaffold", run__rounds=5, train__momentum=0.0)
    own = [vector for name, vector in scaffold.vectors.items() if name.startswith("variate.")]
    assert own
    mean = torch.stack(own).double().sum(dim=0) / 12
    torch.testing.assert_close(scaffold.vectors["variate"].double(), mean, rtol=1e-4, atol=1e-6)


def test_scaffolds_new_variate_is_the_mean_gradient_of_the_local_steps() -> None:
    """K uncorrected steps on a constant gradient g: (x - y) / (K lr) = g for m = 0, and for momentum by the sum."""
    g, x = torch.tensor([2.0, -1.0]), torch.zeros(2)
    for momentum in (0.0, 0.9):
        y, buffer = x.clone(), torch.zeros(2)
        for _ in range(7):
            buffer = momentum * buffer + g
            y = y - 0.1 * buffer
        found = option_two(torch.zeros(2), x, y, Train(momentum=momentum), 0.1, 7)
        torch.testing.assert_close(found, g)
    assert effective_steps(7, 0.0) == 7
    assert effective_steps(1, 0.9) == pytest.approx(1)


def test_an_ensemble_of_one_is_fedavg(run: Run) -> None:
    fedavg, ensemble = run("fedavg"), run("ensembles", ensembles__members=1)
    assert same(fedavg.vectors["expert.0"], ensemble.vectors["expert.0"])
    pair = run("ensembles", ensembles__members=2)
    assert same(fedavg.vectors["expert.0"], pair.vectors["expert.0"])
    assert not same(pair.vectors["expert.0"], pair.vectors["expert.1"])


@pytest.mark.parametrize(("name", "mix"), [("fedjets", "logits"), ("fedjets", "probs"), ("fedmix", "probs")])
def test_one_expert_without_anchors_is_fedavg(run: Run, name: str, mix: str) -> None:
    uniform = {"cohort__sampling": "uniform", "partition__anchors": 5, "cohort__anchors": 5}
    fedavg = run("fedavg", **uniform)
    one = run(name, moe__experts=1, moe__top_k=1, moe__mix=mix, fedmix__weighting="samples", **uniform)
    torch.testing.assert_close(fedavg.vectors["expert.0"], one.vectors["expert.0"], rtol=0, atol=1e-6)
    if mix == "logits":
        assert same(fedavg.vectors["expert.0"], one.vectors["expert.0"])


def test_a_method_mixes_in_its_own_way_unless_told(run: Run) -> None:
    """FedJETs mixes logits; FedMix probabilities, as its answers do, and refuses to be told otherwise."""
    jets = {mix: run("fedjets", run__rounds=1, moe__mix=mix).vectors["gate"] for mix in ("", "logits", "probs")}
    assert same(jets[""], jets["logits"])
    assert not same(jets[""], jets["probs"])
    mixed = {mix: run("fedmix", run__rounds=1, moe__mix=mix).vectors["gate"] for mix in ("", "probs")}
    assert same(mixed[""], mixed["probs"])
    with pytest.raises(FedjetsError, match="moe.mix = 'logits': .* set it to 'probs'"):
        run("fedmix", run__rounds=1, moe__mix="logits")


def trained_in(run: Finished) -> dict[str, int]:
    """Return how many clients trained each vector in the last round."""
    found: dict[str, int] = read_metrics(run.config.run_dir)[-1]["trained"]
    return found


@pytest.mark.parametrize("name", ["fedavg", "fedjets", "scaffold"])
def test_pooling_raises_the_variances_and_changes_nothing_else(run: Run, name: str) -> None:
    plain, pooled = run(name, run__rounds=1), run(name, run__rounds=1, aggregation__bn="pooled")
    rest = torch.ones(plain.strategy.specs["expert.0"].size, dtype=torch.bool)
    rest[variances := plain.strategy.specs["expert.0"].positions("running_var")] = False
    for m in range(plain.strategy.num_experts):
        a, b = plain.vectors[f"expert.{m}"], pooled.vectors[f"expert.{m}"]
        assert same(a[rest], b[rest])
        assert (b >= a)[variances].all()
        assert (b > a)[variances].any() == (trained_in(pooled)[f"expert.{m}"] > 1)


def test_an_expert_that_nobody_trained_keeps_its_bits(run: Run) -> None:
    method = run("fedjets", cohort__anchors=1, cohort__normals=0, run__rounds=1, moe__init="random")
    (trained,) = [name for name in trained_in(method) if name.startswith("expert.")]
    for m in range(5):
        start = method.strategy.state()[f"expert.{m}"]
        assert same(method.vectors[f"expert.{m}"], start) == (f"expert.{m}" != trained)


def test_fewer_bytes_than_fedmix(run: Run) -> None:
    """A client of FedJETs moves at most K of M experts and the gate each way; FedMix moves all M."""
    fedjets, fedmix = run("fedjets"), run("fedmix", moe__top_k=5)
    expert, gate = fedjets.vectors["expert.0"].numel() * 4, fedjets.vectors["gate"].numel() * 4
    jets, mix = fedjets.exchange.traffic, fedmix.exchange.traffic
    training = 3 * 9
    assert mix.down == mix.up == training * (5 * expert + gate)
    for moved in (jets.down, jets.up):
        assert moved <= training * (2 * expert + gate) <= 2 / 5 * mix.up + training * gate


@pytest.mark.parametrize("name", strategies.names())
def test_every_method_comes_with_preset_and_readme_row_and_runs(run: Run, name: str) -> None:
    preset = read_preset(name)
    assert preset["strategy.name"] == name
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()
    own = {key.replace(".", "__").replace("-", "_"): value for key, value in preset.items()}
    method = run(name, **own | {"run__rounds": 1})
    assert bool(trained_in(method)) == (name in (*TRAINED, *OF_TEXT))


@pytest.mark.slow
@pytest.mark.parametrize("name", strategies.names())
def test_every_method_runs_through_the_real_engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "end-to-end-methods"
    folder.mkdir(exist_ok=True)
    summary = finish(folder, name, "--preset", name, "-c", "run.rounds=1")
    assert summary["strategy"] == name
    assert summary["failures"] == 0
