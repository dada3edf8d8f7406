"""The split in which two classes make up most of a client's samples."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.majority import Urn, class_pairs
from fedjets_flwr.data.partition import Pool, Split, make_split
from fedjets_flwr.errors import FedjetsError

CLASSES = 10
TRAIN, TEST = (np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), n)) for n in (120, 40))


def make(**changes: Scalar) -> tuple[Config, Split]:
    flat: dict[str, Scalar] = {
        "partition.name": "majority", "partition.clients": 12, "partition.samples-per-client": 50,
        "partition.val-share": 0.2, "partition.test-share": 0.4, "partition.unseen-clients": 3,
        "moe.experts": 1, "moe.top-k": 1, "cohort.anchors": 0, "cohort.normals": 4,
    }  # fmt: skip
    config = Config.from_flat(flat | {f"partition.{key}".replace("_", "-"): value for key, value in changes.items()})
    return config, make_split(config, Pool(TRAIN), Pool(TEST), CLASSES)


@settings(max_examples=25)
@given(st.floats(0, 1), st.integers(0, 10_000))
def test_sizes_and_shares_are_exact_and_what_trains_or_stops_is_nobody_elses(share: float, seed: int) -> None:
    config, split = make(majority_share=share)
    pairs = class_pairs(CLASSES, 15, "distinct", np.random.default_rng(seed))
    assert len(set(pairs)) == 15
    for part, labels, size in ((split.samples[:12], TRAIN, 20), (split.val, TRAIN, 10), (split.test, TEST, 20)):
        assert [len(rows) for rows in part] == [size] * 12
        for rows in part:
            assert len(set(rows.tolist())) == size
            counts = Counter(labels[rows].tolist())
            two = sum(count for _, count in counts.most_common(2))
            assert two >= 2 * int(share * size / 2)
    used = np.concatenate([*split.samples[:12], *split.val])
    assert len(set(used.tolist())) == len(used)
    assert [len(rows) for rows in split.samples[12:]] == [50] * 3
    assert list(split.unseen_ids) == [12, 13, 14]


def test_one_client_has_the_same_pair_in_all_its_parts_and_at_share_one_nothing_else() -> None:
    _, split = make(majority_share=1.0)
    for client in range(12):
        held = [
            set(labels[rows].tolist())
            for part, labels in ((split.samples, TRAIN), (split.val, TRAIN), (split.test, TEST))
            for rows in [part[client]]
        ]
        assert held[0] == held[1] == held[2]
        assert len(held[0]) == 2


def test_pairs_are_all_different_exclusive_or_as_the_code_has_them() -> None:
    rng = np.random.default_rng(1)
    distinct = class_pairs(4, 8, "distinct", rng)
    assert sorted(distinct[:6]) == list(combinations(range(4), 2))
    assert distinct[6:] == distinct[:2]
    exclusive = class_pairs(8, 4, "exclusive", rng)
    assert sorted(label for pair in exclusive for label in pair) == list(range(8))
    assert class_pairs(3, 10, "code", rng) == [(a, b) for a in range(3) for b in range(3)] + [(0, 0)]
    with pytest.raises(FedjetsError, match=r"partition\.pairs = 'exclusive': 8 classes make 4 pairs.* 5 clients"):
        class_pairs(8, 5, "exclusive", rng)


def test_a_share_of_two_in_c_is_alike_for_all_classes() -> None:
    urn = Urn([np.arange(1000 * label, 1000 * (label + 1)) for label in range(10)], np.random.default_rng(2), True)
    drawn = np.concatenate([urn.draw((0, 1), 100, 0.2) for _ in range(200)]) // 1000
    shares = np.bincount(drawn) / len(drawn)
    assert np.allclose(shares, 0.1, atol=0.01)
    assert shares[0] == shares[1] == 0.1


def test_equal_classes_of_a_pair_count_twice() -> None:
    urn = Urn([np.arange(100 * label, 100 * (label + 1)) for label in range(3)], np.random.default_rng(3), False)
    assert Counter((urn.draw((1, 1), 20, 0.8) // 100).tolist())[1] == 16


def test_samples_that_do_not_suffice_are_told_by_the_setting() -> None:
    with pytest.raises(FedjetsError, match=r"partition\.samples-per-client: no .* samples of the classes"):
        make(samples_per_client=400)
    with pytest.raises(FedjetsError, match=r"partition\.samples-per-client = 0: the majority split"):
        make(samples_per_client=0)


def test_a_part_that_rounds_to_nothing_is_named() -> None:
    for wrong in (
        {"samples_per_client": 3, "val_share": 0.5, "test_share": 0.4},
        {"samples_per_client": 4, "val_share": 0.1, "test_share": 0.4},
    ):
        with pytest.raises(FedjetsError, match=r"partition\.samples-per-client = \d: too few for a part to train on"):
            make(**wrong)


def test_pairs_exclude_each_other_among_clients_that_train() -> None:
    _, split = make(pairs="exclusive", clients=5, majority_share=1.0)
    held = [frozenset(TRAIN[rows].tolist()) for rows in split.samples[:5]]
    assert len(frozenset().union(*held)) == 10
    assert [len(rows) for rows in split.samples[5:]] == [50] * 3


def test_validation_clients_have_pairs_and_samples_of_their_own() -> None:
    _, plain = make(public_share=0.3, unseen_samples=10)
    _, split = make(public_share=0.3, unseen_samples=10, validation_clients=2)
    assert len(split.samples) == 17
    trained = set(np.concatenate([*split.samples[:12], *split.val]).tolist())
    for client in split.validation_ids:
        assert trained.isdisjoint(split.samples[client].tolist())
    for a, b in zip(plain.samples[:12], split.samples[:12], strict=True):
        assert np.array_equal(a, b)
