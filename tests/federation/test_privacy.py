"""Differential privacy: the mechanism by its closed form, the accountant against other ways to count."""

import gc
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import strategies
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.privacy import Ledger, PrivateMeans, Release, randomise, release_of, spent
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.faults import Runner, all_weights_finite, failures, same
from tests.support.runs import TinyRunner


def config(**changes: Scalar) -> Config:
    return Config.from_flat({key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()})


def private(old: Tensor, vectors: list[Tensor], moved: int = 1, **changes: Scalar) -> Tensor:
    means = PrivateMeans({"a": old}, config(**changes).privacy, moved)
    for position, vector in enumerate(vectors):
        means.add("a", vector, 1.0 + 100 * position)
    return means.result()["a"]


# The mechanism --------------------------------------------------------------------------------------------------------


def test_without_noise_it_is_the_equal_mean_of_clipped_updates() -> None:
    """From (1, 1): (3, 4) is cut from norm 5 to 2: (1.2, 1.6); (0, 1) stays; their mean is (0.6, 1.3)."""
    old = torch.ones(2)
    sent = [old + torch.tensor([3.0, 4.0]), old + torch.tensor([0.0, 1.0])]
    found = private(old, sent, privacy__clip_norm=2.0, privacy__noise_multiplier=1e-12)
    torch.testing.assert_close(found, torch.tensor([1.6, 2.3]))


def test_an_update_smaller_than_one_is_clipped_too() -> None:
    found = private(torch.zeros(2), [torch.tensor([0.3, 0.4])], privacy__clip_norm=0.1, privacy__noise_multiplier=1e-12)
    torch.testing.assert_close(found, torch.tensor([0.06, 0.08]))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_client_moves_the_sum_by_more_than_the_bound(scale: float) -> None:
    old, sent = torch.zeros(100), scale * torch.randn(100, generator=torch.Generator().manual_seed(1))
    found = private(old, [sent], privacy__clip_norm=0.5, privacy__noise_multiplier=1e-12)
    assert float(found.norm()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("z", "clip", "moved", "clients"), [(1.0, 1.0, 1, 1), (2.0, 0.5, 3, 4), (0.3, 4.0, 6, 10)])
def test_the_noise_on_the_sum_has_standard_deviation_z_c_root_v(
    z: float, clip: float, moved: int, clients: int
) -> None:
    old = torch.zeros(40_000)
    found = private(
        old, [old] * clients, moved, privacy__noise_multiplier=z, privacy__clip_norm=clip
    ) * clients  # fmt: skip
    expected = z * clip * math.sqrt(moved)
    assert float(found.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * 40_000))
    assert abs(float(found.mean())) < 4 * expected / math.sqrt(40_000)
    inside = float((found.abs() < expected).float().mean())
    assert inside == pytest.approx(2 * NormalDist().cdf(1) - 1, abs=0.012)


def test_every_noise_is_new() -> None:
    """Between vectors, rounds, and two objects of the same settings; and between two processes, which a run shows."""

    def noise() -> list[Tensor]:
        old = {"a": torch.zeros(500), "b": torch.zeros(500)}
        means = PrivateMeans(old, config(privacy__noise_multiplier=1.0).privacy, 2)
        for name, vector in old.items():
            means.add(name, vector, 1.0)
        return list(means.result().values()) + list(means.result().values())

    torch.manual_seed(0)
    np.random.seed(0)
    draws = noise()
    torch.manual_seed(0)
    np.random.seed(0)
    draws += noise()
    for a, b in combinations(draws, 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.25


def test_a_vector_that_nobody_sent_gets_no_noise() -> None:
    old = {"a": torch.zeros(3), "b": torch.zeros(3)}
    means = PrivateMeans(old, config(privacy__noise_multiplier=1.0).privacy, 1)
    means.add("a", old["a"], 1.0)
    assert set(means.result()) == {"a"}


@pytest.mark.parametrize(
    ("name", "moved"), [("fedavg", 1), ("fedprox", 1), ("fedjets", 3), ("fedmix", 6)]
)  # fmt: skip
def test_vectors_that_a_client_moves(run: Runner, name: str, moved: int) -> None:
    """No job asks for more vectors back than the noise is scaled for."""
    method = run(strategy__name=name, run__rounds=1)
    assert method.strategy.vectors_moved == moved
    cohort = method.rounds.cohort
    jobs = method.strategy.plan(cohort, dict.fromkeys(cohort.normals, tuple(range(method.config.moe.top_k))))
    assert max(len(job.returns) for job in jobs) <= moved


# The accountant -------------------------------------------------------------------------------------------------------

Z, ROUNDS, DELTA = 8.0, 30, 1e-3
BASE: dict[str, Scalar] = {"privacy__noise_multiplier": Z, "run__rounds": ROUNDS, "privacy__delta": DELTA}


def spent_by(sampling: str, **changes: Scalar) -> dict[str, float]:
    """What a run that is done once spends."""
    c = config(**BASE | changes)
    return spent([release_of(c, sampling)] * c.run.rounds, {}, c.privacy.delta)


def gaussian_delta(epsilon: float, rounds: int, z: float) -> float:
    """The exact delta of composed Gaussians of noise z and sensitivity 2 (Balle and Wang 2018): mu = 2 sqrt(T) / z."""
    mu, cdf = 2 * math.sqrt(rounds) / z, NormalDist().cdf
    return cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)


def exact_epsilon(rounds: int, z: float, delta: float) -> float:
    low, high = 0.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, rounds, z) > delta else (low, middle)
    return high


def renyi_epsilon(rounds: int, z: float, delta: float) -> float:
    """The classic conversion (Mironov 2017): min over alpha of T alpha mu^2 / 2 + log(1 / delta) / (alpha - 1)."""
    alphas = [1 + k / 100 for k in range(1, 20_000)]
    return min(rounds * a * (2 / z) ** 2 / 2 + math.log(1 / delta) / (a - 1) for a in alphas)


def test_an_anchor_of_every_round_has_no_amplification() -> None:
    pytest.importorskip("dp_accounting")
    found = spent_by("anchored")
    assert found["delta"] == DELTA
    assert exact_epsilon(ROUNDS, Z, DELTA) <= found["epsilon_anchor"] <= renyi_epsilon(ROUNDS, Z, DELTA)
    assert found["epsilon_anchor"] <= 1.3 * exact_epsilon(ROUNDS, Z, DELTA)


def test_everyone_in_every_round_is_a_plain_gaussian() -> None:
    pytest.importorskip("dp_accounting")
    all_in = spent_by("uniform", cohort__anchors=5, cohort__normals=15)
    assert all_in["epsilon_normal"] == all_in["epsilon_anchor"]
    assert all_in["epsilon_normal"] == pytest.approx(spent_by("anchored")["epsilon_anchor"])


@pytest.mark.parametrize(
    ("sampling", "population", "drawn", "who"),
    [
        ("anchored", 15, 5, "epsilon_normal_secret_cohorts"),
        ("uniform", 20, 10, "epsilon_normal_secret_cohorts"),
        ("uniform", 20, 10, "epsilon_anchor_secret_cohorts"),
        ("one-per-domain", 4, 1, "epsilon_normal_secret_cohorts"),  # 20 clients of five domains
    ],
)  # fmt: skip
def test_equals_a_composition_of_single_rounds(sampling: str, population: int, drawn: int, who: str) -> None:
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    for rounds in (1, 9, ROUNDS - 10):
        event = dp.SampledWithoutReplacementDpEvent(population, drawn, dp.GaussianDpEvent(Z / 2))
        accountant.compose(dp.SelfComposedDpEvent(event, rounds))
    found = spent_by(sampling)
    # The bound without sampling holds too; the smaller one is told.
    assert found[who] == pytest.approx(min(accountant.get_epsilon(DELTA), found["epsilon_normal"]))


def test_a_reader_who_knows_the_cohorts_sees_no_amplification() -> None:
    pytest.importorskip("dp_accounting")
    anchored, uniform = spent_by("anchored"), spent_by("uniform")
    joined = anchored["epsilon_anchor"]
    assert joined == pytest.approx(anchored["epsilon_anchor_secret_cohorts"])
    assert [anchored["epsilon_normal"], uniform["epsilon_normal"], uniform["epsilon_anchor"]] == [joined] * 3
    assert anchored["epsilon_normal_secret_cohorts"] < joined


def test_sampling_never_costs_more_than_joining_every_round() -> None:
    """The bound without amplification always holds; that of sampling is the looser one for large samples."""
    pytest.importorskip("dp_accounting")
    found = spent_by("uniform")
    assert found["epsilon_normal_secret_cohorts"] <= found["epsilon_normal"]


def test_more_rounds_cost_more_and_more_noise_less() -> None:
    pytest.importorskip("dp_accounting")

    def epsilon(**changes: Scalar) -> tuple[float, float]:
        found = spent_by("anchored", **changes)
        return found["epsilon_normal_secret_cohorts"], found["epsilon_anchor_secret_cohorts"]

    for a, b in (
        (epsilon(), epsilon(run__rounds=60)),
        (epsilon(privacy__noise_multiplier=20.0), epsilon()),
        (epsilon(privacy__delta=1e-2), epsilon()),
    ):
        assert a[0] < b[0]
        assert a[1] < b[1]
    assert epsilon(cohort__anchors=2)[1] < epsilon()[1]
    assert epsilon(cohort__normals=0)[0] == 0


def test_no_accountant_is_said_before_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(FedjetsError, match=r"pip install 'fedjets-flwr\[privacy\]'"):
        spent_by("anchored")
    tiny_run = TinyRunner(tmp_path, monkeypatch)
    with pytest.raises(FedjetsError, match=r"pip install 'fedjets-flwr\[privacy\]'"):
        tiny_run("fedjets", run__name="noisy", privacy__noise_multiplier=1.0)
    assert not list((tmp_path / "runs" / "noisy" / "checkpoints").glob("*"))
    assert spent([], {3: 1.5}, DELTA)["route_epsilon"] == 1.5  # routes alone need none


def test_releases_of_different_noise_are_composed() -> None:
    """Gaussians of z1 and z2 together are one of z with 1 / z^2 = 1 / z1^2 + 1 / z2^2."""
    pytest.importorskip("dp_accounting")
    pools = ((15, 5), (5, 5))
    together = spent([Release(6.0, *pools), Release(8.0, *pools)], {}, DELTA)["epsilon_anchor"]
    assert together == pytest.approx(spent([Release(4.8, *pools)], {}, DELTA)["epsilon_anchor"], rel=1e-6)


def test_who_is_never_drawn_spends_nothing_and_one_a_round_spends_as_much_as_five() -> None:
    pytest.importorskip("dp_accounting")
    nobody, one, five = (spent([Release(6.0, (15, drawn), (5, 5))], {}, DELTA) for drawn in (0, 1, 5))
    assert nobody["epsilon_normal"] == nobody["epsilon_normal_secret_cohorts"] == 0.0
    assert one["epsilon_normal"] == five["epsilon_normal"] > 0
    assert 0 < one["epsilon_normal_secret_cohorts"] < five["epsilon_normal_secret_cohorts"]


def test_what_is_spent_is_told_by_name() -> None:
    """Of the uploaded ids the client that answered most often counts; averages without noise have no epsilon."""
    found = spent([], {3: 0.75, 7: 0.5}, DELTA)
    assert found == {"releases": 0, "delta": DELTA, "route_epsilon": 0.75}


def test_nothing_released_is_nothing_spent() -> None:
    pytest.importorskip("dp_accounting")
    found = spent([], {}, DELTA)
    assert {value for name, value in found.items() if "epsilon" in name} == {0.0}


# The ledger -----------------------------------------------------------------------------------------------------------


def test_the_ledger_is_read_back_and_outlives_its_writer(tmp_path: Path) -> None:
    one, two = Release(1.5, (15, 5), (5, 5)), Release(2.0, (20, 10), (20, 10))
    Ledger(tmp_path).sums(1, one)
    Ledger(tmp_path).routes(2, [7, 3], 0.5)
    ledger = Ledger(tmp_path)
    ledger.sums(2, two)
    ledger.routes(3, [3], 0.25)
    assert ledger.read() == ([one, two], {3: 0.75, 7: 0.5})


def test_the_lines_of_the_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.sums(4, Release(1.5, (15, 5), (5, 2)))
    ledger.routes(6, (7, 3), 0.5)
    lines = [json.loads(line) for line in (tmp_path / "releases.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "sums", "round": 4, "noise_multiplier": 1.5, "normal": [15, 5], "anchor": [5, 2]},
        {"kind": "routes", "round": 6, "epsilon": 0.5, "clients": [3, 7]},
    ]


def test_a_line_that_was_cut_off_counts_nothing(tmp_path: Path) -> None:
    """It is on the disk before what it counts gets out."""
    one = Release(1.5, (15, 5), (5, 5))
    Ledger(tmp_path).sums(1, one)
    Ledger(tmp_path).sums(1, one)
    with (tmp_path / "releases.jsonl").open("a") as file:
        file.write('{"kind": "sums", "rou')
    ledger = Ledger(tmp_path)
    ledger.sums(2, one)
    assert ledger.read() == ([one, one, one], {})


@pytest.mark.parametrize("line", ["{", "3", '{"kind": "sums"}', '{"kind": "routes", "epsilon": "x", "clients": [1]}'])
def test_a_damaged_ledger_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "releases.jsonl").write_text(f"{line}\n")
    with pytest.raises(FedjetsError, match=r"releases.jsonl: line 1 is damaged; .* another run.name"):
        Ledger(tmp_path)


def test_no_key_of_the_noise_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".noise-key").write_text("12345")
    Ledger(tmp_path)
    assert not (tmp_path / ".noise-key").exists()


# Expert ids -----------------------------------------------------------------------------------------------------------


def test_randomised_response_turned_off() -> None:
    assert randomise((3, 1), 5, 0.0, np.random.default_rng(1)) == (3, 1)


@pytest.mark.parametrize(("experts", "k", "epsilon"), [(5, 2, 1.0), (4, 1, 0.5), (5, 2, 3.0)])
def test_likelihoods_of_answers(experts: int, k: int, epsilon: float) -> None:
    """P(true set) = e^eps / (e^eps - 1 + n), any other 1 / (e^eps - 1 + n): their ratio is e^eps."""
    rng, draws, true = np.random.default_rng(1), 30_000, tuple(range(k))
    counts: Counter[frozenset[int]] = Counter()
    for _ in range(draws):
        found = randomise(true, experts, epsilon, rng)
        assert len(found) == len(set(found)) == k
        assert all(0 <= m < experts for m in found)
        counts[frozenset(found)] += 1
    sets = [frozenset(chosen) for chosen in combinations(range(experts), k)]
    total = math.expm1(epsilon) + len(sets)
    for chosen in sets:
        p = (math.exp(epsilon) if chosen == frozenset(true) else 1.0) / total
        assert counts[chosen] == pytest.approx(draws * p, abs=5 * math.sqrt(draws * p * (1 - p)))


def test_the_order_of_an_answer_tells_nothing_of_its_truth() -> None:
    """The true ids come best first; were random ones always in ascending order, (3, 1) would give the truth away."""
    rng = np.random.default_rng(1)
    orders = Counter(randomise((3, 1), 5, 1.0, rng) for _ in range(4000))
    assert not (orders[3, 1] and orders[1, 3])


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("privacy"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


@pytest.mark.parametrize("name", ["scaffold", "ensembles"])
def test_methods_whose_state_tells_more_refuse_noise(name: str) -> None:
    with pytest.raises(FedjetsError, match=rf"privacy.noise-multiplier = 1.*{name}.*set it to 0"):
        strategies.strategy(name).validate(config(strategy__name=name, privacy__noise_multiplier=1.0))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "set model.norm = 'group', or moe.trainable = 'head'"),
        ({"moe__trainable": "stage"}, "set model.norm = 'group'"),
        ({"model__norm": "group", "privacy__delta": 0.05}, "privacy.delta = 0.05: .* set it below .* 0.05"),
        ({"model__norm": "group", "aggregation__rule": "median"}, "aggregation.rule"),
        ({"model__norm": "group", "cohort__anchor_selection": "farthest"}, "cohort.anchor-selection"),
    ],
)
def test_settings_that_break_the_promise_are_refused(changes: dict[str, Scalar], told: str) -> None:
    with pytest.raises(FedjetsError, match=told):
        strategies.strategy("fedjets").validate(config(privacy__noise_multiplier=1.0, **changes))


@pytest.mark.parametrize("changes", [{"model__norm": "group"}, {"moe__trainable": "head"}])
def test_settings_that_keep_the_promise_are_taken(changes: dict[str, Scalar]) -> None:
    strategies.strategy("fedjets").validate(config(privacy__noise_multiplier=1.0, **changes))


def test_statistics_of_a_common_expert_in_a_file_are_seen(run: Runner) -> None:
    """Experts that start from it have its batch norm, whatever ``model.norm`` says."""
    path = run(strategy__name="fedavg", run__rounds=1).config.run_dir / "common-expert.safetensors"
    with pytest.raises(FedjetsError, match="running variances"):
        run(strategy__name="fedavg", common_expert__path=str(path), model__norm="group", **NOISE)


NOISE: dict[str, Scalar] = {"privacy__noise_multiplier": 0.5, "privacy__clip_norm": 0.05}
GROUP: dict[str, Scalar] = {"model__norm": "group", "cohort__normals": 7, "run__evaluate_every": 2}


@pytest.mark.parametrize("name", ["fedavg", "fedjets", "fedmix"])
def test_a_private_run_is_of_use_and_tells_what_it_spent(run: Runner, name: str) -> None:
    """Noise of half a client's update on each sum: four rounds still gain 3.5 to 6.5 points over the common expert."""
    pytest.importorskip("dp_accounting")
    found = run(strategy__name=name, run__rounds=4, common_expert__target_accuracy=0.75, **NOISE | GROUP)
    assert failures(found) == [{}] * 4
    assert all_weights_finite(found)
    summary: dict[str, Any] = json.loads((found.config.run_dir / "summary.json").read_text())
    assert summary["accuracy"] > summary["common_expert_accuracy"] + 0.01 > 0.8
    assert summary["privacy"] == pytest.approx(spent([release_of(found.config, found.strategy.drawn)] * 4, {}, 1e-3))
    assert summary["privacy"]["epsilon_normal"] > 0


def ended(run: Runner, **changes: Scalar) -> tuple[Path, Tensor]:
    """Return the folder and the model of a private FedAvg whose objects, and so its lock, are gone."""
    found = run(strategy__name="fedavg", **NOISE | GROUP | changes)
    folder, vector = found.config.run_dir, found.vectors["expert.0"]
    del found
    gc.collect()
    return folder, vector


def test_the_same_run_again_has_other_noise_and_spends_more(run: Runner) -> None:
    """The difference of the two states is noise of both, and no client's update."""
    pytest.importorskip("dp_accounting")
    (folder, first), (_, second) = (
        ended(run, run__name="again", run__rounds=1, run__overwrite=again) for again in (False, True)
    )
    assert float((first - second).std()) == pytest.approx(math.sqrt(2) * 0.5 * 0.05 / 12, rel=0.1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["privacy"]["releases"] == 2
    assert not (folder / ".noise-key").exists()


def test_rounds_done_again_after_a_resume_are_counted(run: Runner) -> None:
    """Checkpoint after round 2 of 3: the third is released twice."""
    pytest.importorskip("dp_accounting")
    same_run: dict[str, Scalar] = {"run__name": "resumed", "run__checkpoint_every": 2, "run__rounds": 3}
    folder, first = ended(run, **same_run)
    for path in (folder / "checkpoints").glob("round-000003-*"):
        path.unlink()
    _, second = ended(run, run__resume=True, **same_run)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["privacy"]["releases"] == 4
    assert not same(first, second)


def test_randomised_expert_ids_reach_the_run(run: Runner) -> None:
    exact, noisy = run(strategy__name="fedjets"), run(strategy__name="fedjets", privacy__route_epsilon=0.1)
    assert failures(noisy) == [{}, {}, {}]
    assert not same(exact.vectors["gate"], noisy.vectors["gate"])


def test_every_question_for_expert_ids_is_counted(run: Runner) -> None:
    """Unseen clients answer at each of three evaluations, a normal client whenever it is asked, also ahead of time."""
    found = run(strategy__name="fedjets", privacy__route_epsilon=0.5, run__evaluate_every=1)
    _, routes = found.rounds.clients.ledger.read()
    assert [routes[client] for client in found.rounds.clients.unseen] == [1.5] * 3
    summary = json.loads((found.config.run_dir / "summary.json").read_text())
    assert summary["privacy"]["route_epsilon"] == max(routes.values()) >= 1.5
    asked = [client for record in read_metrics(found.config.run_dir) for client in record["cohort"] if client >= 5]
    assert {c: routes[c] for c in set(asked)} == {c: 0.5 * asked.count(c) for c in set(asked)}
