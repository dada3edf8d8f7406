"""What clients keep out of the federation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.data.consent import opted_out, shared
from fedjets_flwr.errors import FedjetsError
from tests.support.tiny import tiny

SAFE: dict[str, Scalar] = {"partition__public_share": 0.2}


def config(**changes: Scalar) -> Config:
    return tiny(**SAFE | changes)


def test_who_opts_out_at_a_smaller_share_does_at_a_larger_one() -> None:
    few, more, all_ = (opted_out(config(partition__opt_out=share)) for share in (0.3, 0.6, 1.0))
    assert (len(few), len(more), len(all_)) == (2, 4, 7)
    assert few < more < all_
    assert opted_out(config()) == frozenset()
    assert few != opted_out(config(partition__opt_out=0.3, run__seed=5)) or more != opted_out(
        config(partition__opt_out=0.6, run__seed=5)
    )


def test_private_samples_are_left_out_in_order_and_nested() -> None:
    samples = np.arange(100, 120)
    assert shared(config(), 1, samples).tolist() == samples.tolist()
    half, fifth = (shared(config(partition__private_share=share), 1, samples) for share in (0.5, 0.8))
    assert (len(half), len(fifth)) == (10, 4)
    assert set(fifth) < set(half) < set(samples)
    assert half.tolist() == sorted(half)
    assert half.tolist() != shared(config(partition__private_share=0.5), 2, samples).tolist()


def test_a_part_is_what_a_client_shares_of_what_it_trains_on() -> None:
    some = config(partition__private_share=0.5, partition__val_share=0.2, partition__test_share=0.2)
    for client in range(3):
        train, part = (open_client(some, client, part=name).images for name in ("train", "shared"))
        assert len(part) == len(train) - round(0.5 * len(train))
        held = {bytes(image.numpy()) for image in train.pixels}
        assert {bytes(image.numpy()) for image in part.pixels} < held
    assert torch.equal(
        open_client(some, 8, part="shared").images.pixels, open_client(some, 8).images.pixels
    )  # one that never trains has no part


def test_who_opted_out_shares_nothing_and_has_all_the_same() -> None:
    some = config(partition__opt_out=0.3)
    client = min(opted_out(some))
    assert len(open_client(some, client).images) > 5
    with pytest.raises(FedjetsError, match=rf"client {client} has opted out"):
        open_client(some, client, part="shared")


def test_the_common_expert_must_not_see_what_is_kept_out(tmp_path: Path) -> None:
    for name in ("partition__opt_out", "partition__private_share"):
        with pytest.raises(FedjetsError, match=r"partition\.opt-out, partition\.private-share: the common expert"):
            tiny(**{name: 0.3})
        for way in ({"partition__public_share": 0.2}, {"common_expert__max_epochs": 0}):
            tiny(**{name: 0.3} | way)


def test_a_share_that_leaves_nothing_is_told_by_its_name(tmp_path: Path) -> None:
    few = config(partition__private_share=0.99)
    with pytest.raises(FedjetsError, match=r"partition\.private-share = 0\.99: none of the \d+ samples of client 6"):
        open_client(few, 6, part="shared")
