import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.anchors import SELECTIONS, bounded, select_anchors
from fedjets_flwr.federation.cohort import Cohort, draw_cohort


@pytest.mark.parametrize("how", list(SELECTIONS))
def test_each_cluster_gets_one_anchor(how: str) -> None:
    """Three tight clusters of four clients: whatever the way, one anchor comes from each."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    means = {c: centres[c % 3] + 0.1 * torch.randn(2, generator=generator) for c in range(12)}
    anchors = select_anchors(means, 3, how, seed=5)
    assert sorted(client % 3 for client in anchors) == [0, 1, 2]
    assert list(anchors) == sorted(anchors)
    assert anchors == select_anchors(dict(reversed(means.items())), 3, how, seed=5)


def test_farthest_first_by_hand() -> None:
    """The mean of 0, 1, 2, 9 on a line is 3: client 7 at 9 first, then 4 at 0, then 5 at 2."""
    means = {client: torch.tensor([at, 0.0]) for client, at in ((6, 1.0), (4, 0.0), (7, 9.0), (5, 2.0))}
    assert [select_anchors(means, count, "farthest", 1) for count in (1, 2, 3)] == [(7,), (4, 7), (4, 5, 7)]


def test_a_mean_that_lies_far_out_is_drawn_in_and_the_others_stay() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1e30]], dtype=torch.float64)
    assert bounded(points).tolist() == [[0, 0], [1, 0], [2, 0], [1, 3]]
    small = torch.tensor([[0.0, 0.0], [0.01, 0.0], [0.02, 0.0], [0.01, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(bounded(small)[3], torch.tensor([0.01, 0.03], dtype=torch.float64))


def test_where_most_clients_are_alike_nobody_is_drawn_in() -> None:
    """The median distance is 0, to which nothing can be compared."""
    points = torch.tensor([[2.0], [2.0], [2.0], [7.0]])
    assert torch.equal(bounded(points), points)


def test_k_means_depends_on_its_seed_alone() -> None:
    """Seeds have 63 bits, of which scikit-learn takes 32."""
    generator = torch.Generator().manual_seed(1)
    means = {client: torch.randn(3, generator=generator) for client in range(60)}
    chosen = [select_anchors(means, 20, "k-means", seed) for seed in (2**62 + 2**32 + 5, 2**62 + 5, 5, 5, 6, 7)]
    assert chosen[:3] == [chosen[3]] * 3
    assert len({chosen[3], chosen[4], chosen[5]}) == 3


@pytest.mark.parametrize("how", list(SELECTIONS))
@given(count=st.integers(1, 6), distinct=st.integers(1, 6))
def test_anchors_are_different_clients_even_of_equal_data(how: str, count: int, distinct: int) -> None:
    means = {client: torch.full((3,), float(client % distinct)) for client in range(6)}
    anchors = select_anchors(means, count, how, seed=1)
    assert len(set(anchors)) == count
    assert set(anchors) <= set(means)


def test_too_few_clients_are_named() -> None:
    with pytest.raises(FedjetsError, match=r"moe.experts = 3: only 2 clients"):
        select_anchors({0: torch.zeros(2), 4: torch.ones(2)}, 3, "farthest", 1)


def test_chosen_anchors_are_drawn_as_anchors_and_never_as_normal_clients() -> None:
    config, anchors = Config.from_flat({"cohort.anchors": 3, "cohort.normals": 9}), (2, 5, 7, 11, 19)
    for server_round in range(1, 30):
        cohort = draw_cohort(config, server_round, "anchored", anchors)
        drawn, normals = cohort.anchors, cohort.normals
        assert len(drawn) == 3
        assert set(drawn) <= set(anchors)
        assert len(normals) == 9
        assert not set(normals) & set(anchors)
        assert cohort.server_round == server_round


@pytest.mark.parametrize("sampling", ["anchored", "uniform"])
def test_drawing_from_a_hundred_thousand_clients_takes_a_small_part_of_a_round(sampling: str) -> None:
    """Each client looked up among many anchors took longer than the rest of the round."""
    config = Config.from_flat({"partition.clients": 100_000, "moe.experts": 64, "cohort.normals": 30})
    anchors, without = range(5_000, 5_064), frozenset({5_001, 7, 99_999, 100_003, 2**70})
    seconds = []
    for server_round in range(5):
        begun = time.process_time()
        cohort = draw_cohort(config, server_round, sampling, tuple(anchors), without=without)
        seconds.append(time.process_time() - begun)
        assert set(cohort.anchors) <= set(anchors)
        assert not without.intersection(cohort.clients)
    assert min(seconds) < 0.005


@pytest.mark.parametrize(
    ("sampling", "drawn"),
    [
        ("anchored", Cohort((4, 9, 15), (3, 5, 7, 10, 18, 19), 3)),
        ("uniform", Cohort((), (2, 4, 5, 8, 9, 11, 14, 18, 19), 3)),
    ],
)
def test_the_same_clients_are_drawn_as_ever(sampling: str, drawn: Cohort) -> None:
    config = Config.from_flat({"cohort.anchors": 3, "cohort.normals": 6})
    assert draw_cohort(config, 3, sampling, (15, 9, 4, 12), without=frozenset({12, 0, 40})) == drawn


@pytest.mark.parametrize("sampling", ["anchored", "uniform"])
def test_cohorts_differ_by_seed_round_and_member_and_by_nothing_else(sampling: str) -> None:
    def drawn(seed: int, server_round: int, member: int) -> tuple[int, ...]:
        config = Config.from_flat({"run.seed": seed, "partition.clients": 60, "cohort.normals": 30})
        cohort = draw_cohort(config, server_round, sampling, range(5), member)
        anchors, normals = cohort.anchors, cohort.normals
        return (*anchors, *normals)

    draws = [drawn(seed, t, member) for seed in (1, 2) for t in (1, 2) for member in (0, 1)]
    assert len(set(draws)) == len(draws)
    assert draws == [drawn(seed, t, member) for seed in (1, 2) for t in (1, 2) for member in (0, 1)]
    config = Config.from_flat({"run.seed": 1, "partition.clients": 60, "cohort.normals": 30})
    assert draw_cohort(config, 2, sampling, range(5)) == draw_cohort(config, 2, sampling, range(5), 0)


def test_a_uniform_cohort_is_drawn_from_all_clients_and_knows_no_anchors() -> None:
    config, seen = Config.from_flat({"cohort.anchors": 2, "cohort.normals": 3}), set()
    for server_round in range(1, 60):
        cohort = draw_cohort(config, server_round, "uniform", (0, 1, 2, 3, 4))
        anchors, normals = cohort.anchors, cohort.normals
        assert anchors == ()
        assert len(set(normals)) == 5
        assert list(normals) == sorted(normals)
        seen |= set(normals)
    assert seen == set(range(20))
    few = Config.from_flat({"cohort.anchors": 5, "cohort.normals": 2, "partition.clients": 7})
    assert draw_cohort(few, 1, "uniform", ()) == Cohort((), tuple(range(7)), 1)
    small = Config.from_flat({"cohort.anchors": 2, "cohort.normals": 2, "partition.clients": 20})
    assert len(draw_cohort(small, 1, "uniform", ()).normals) == 4


def on_text(**changes: Scalar) -> Config:
    own: dict[str, Scalar] = {"data.name": "text", "text.domains": "code,slang,manual", "partition.clients": 11}
    return Config.from_flat(own | {"cohort.sampling": "one-per-domain"} | changes)


def test_one_client_of_each_domain_is_drawn() -> None:
    config, seen = on_text(), set()
    for server_round in range(1, 60):
        cohort = draw_cohort(config, server_round, "one-per-domain", ())
        assert cohort.anchors == ()
        assert {client % 3 for client in cohort.normals} == {0, 1, 2}
        assert len(cohort.normals) == 3
        assert list(cohort.normals) == sorted(cohort.normals)
        seen |= set(cohort.normals)
    assert seen == set(range(11))
    assert draw_cohort(config, 9, "one-per-domain", ()) == draw_cohort(config, 9, "one-per-domain", ())
    assert 8 in draw_cohort(config, 1, "one-per-domain", (), without=(2, 5)).normals
    assert {c % 3 for c in draw_cohort(config, 1, "one-per-domain", (), without=(0, 3, 6, 9)).normals} == {1, 2}


@pytest.mark.parametrize(
    "changes", [{"data.name": "digits"}, {"partition.public-share": 1.0}], ids=["images", "sites' own text"]
)
def test_domains_that_nobody_knows_are_not_drawn_by(changes: dict[str, Scalar]) -> None:
    with pytest.raises(FedjetsError, match="cohort.sampling = 'one-per-domain': only text.domains that are dealt"):
        on_text(**changes)
