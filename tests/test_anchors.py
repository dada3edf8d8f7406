import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.config import Config
from fedjets_flwr.errors import FedjetsError
from server_app.anchors import SELECTIONS, select_anchors
from server_app.cohort import draw_cohort


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
        drawn, normals = draw_cohort(config, server_round, "anchored", anchors)
        assert len(drawn) == 3
        assert set(drawn) <= set(anchors)
        assert len(normals) == 9
        assert not set(normals) & set(anchors)
