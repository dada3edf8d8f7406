from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.partition import Pool, Split, _reserve, anchor_groups, held_out, make_split, public_samples
from fedjets_flwr.errors import FedjetsError

CLASSES, TRAIN_PER_CLASS, TEST_PER_CLASS = 10, 60, 20
Labels = frozenset[int]


def pools(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled label arrays with the same number of samples of every class."""
    rng = np.random.default_rng(seed)
    train, test = np.repeat(np.arange(CLASSES), TRAIN_PER_CLASS), np.repeat(np.arange(CLASSES), TEST_PER_CLASS)
    return rng.permutation(train), rng.permutation(test)


TRAIN, TEST = pools()


def make(**changes: Scalar) -> tuple[Config, Split]:
    """Split with settings of ``partition.*``, or of a section that is spelt out: ``moe__experts``."""
    flat: dict[str, Scalar] = {"cohort.anchors": 0, "cohort.normals": 1}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        flat[f"{section or 'partition'}.{name}".replace("_", "-")] = value
    config = Config.from_flat(flat)
    return config, make_split(config, Pool(TRAIN), Pool(TEST), CLASSES)


def held(split: Split) -> list[Labels]:
    return [
        frozenset((TRAIN if client < split.training else TEST)[rows].tolist())
        for client, rows in enumerate(split.samples)
    ]


def check_frame(config: Config, split: Split) -> None:
    part = config.partition
    assert (split.anchors, split.training) == (config.num_anchors, part.clients)
    assert list(split.unseen_ids) == list(range(part.clients, part.clients + part.unseen_clients))
    assert len(split.samples) == part.clients + part.unseen_clients
    for client, rows in enumerate(split.samples):
        assert rows.dtype.kind == "i"
        assert len(rows) > 0
        assert rows.min() >= 0
        assert rows.max() < len(TRAIN if client < split.training else TEST)


def check_unseen_are_new(split: Split) -> None:
    labels = held(split)
    training, unseen = labels[: split.training], labels[split.training :]
    assert len(set(unseen)) == len(unseen)
    assert not set(unseen) & set(training)


def check_anchors(labels: list[Labels], anchors: int) -> None:
    together = [label for group in labels[:anchors] for label in group]
    assert sorted(together) == list(range(CLASSES))
    sizes = {len(group) for group in labels[:anchors]}
    assert max(sizes) - min(sizes) <= 1


quantity = st.fixed_dictionaries(
    {
        "run__seed": st.integers(0, 2**40),
        "moe__experts": st.integers(2, CLASSES),
        "clients": st.integers(12, 25),
        "unseen_clients": st.integers(1, 8),
        "labels_per_client": st.integers(2, 8),
        "samples_per_client": st.one_of(st.just(0), st.integers(10, 90)),
        "unseen_samples": st.one_of(st.just(0), st.integers(10, 40)),
    }
)


@settings(max_examples=60, deadline=None)
@given(quantity)
def test_quantity(changes: dict[str, int]) -> None:
    config, split = make(name="quantity", **changes)
    part, anchors = config.partition, config.num_anchors
    check_frame(config, split)
    check_unseen_are_new(split)
    labels = held(split)
    check_anchors(labels, anchors)
    assert all(len(group) == part.labels_per_client for group in labels[anchors:])
    for client, rows in enumerate(split.samples):
        wanted = part.samples_per_client if client < part.clients else part.unseen_samples
        if wanted:
            assert len(rows) == wanted
            source = TRAIN if client < part.clients else TEST
            counts = Counter(source[rows].tolist()).values()
            assert max(counts) - min(counts) <= 1
    if not part.unseen_samples:
        for client in split.unseen_ids:
            assert sorted(split.samples[client]) == np.flatnonzero(np.isin(TEST, list(labels[client]))).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from([(2, 5), (5, 2), (5, 4), (5, 6), (10, 3)]), st.integers(1, 3))
def test_label_groups(seed: int, experts_and_k: tuple[int, int], unseen: int) -> None:
    """A normal or unseen client's labels are the union of whole anchor groups; one group alone is an anchor's."""
    experts, k = experts_and_k
    settings_: dict[str, Scalar] = {
        "name": "label-groups", "run__seed": seed, "moe__experts": experts, "labels_per_client": k, "clients": 14,
        "unseen_clients": unseen, "samples_per_client": 30,
    }  # fmt: skip
    if k == CLASSES // experts:
        with pytest.raises(FedjetsError, match=rf"^partition\.labels-per-client = {k}"):
            make(**settings_)
        return
    config, split = make(**settings_)
    check_frame(config, split)
    check_unseen_are_new(split)
    labels = held(split)
    check_anchors(labels, experts)
    for group in labels[experts:]:
        assert len(group) == k
        assert all(anchor <= group or not anchor & group for anchor in labels[:experts])
    assert all(len(split.samples[client]) == 30 for client in range(split.training))


def test_half_of_the_combinations_are_left_for_training() -> None:
    """Five groups have ten pairs: five are kept out of training and shared by eight clients with other samples."""
    _, split = make(name="label-groups", labels_per_client=4, unseen_clients=8, unseen_samples=20, clients=40)
    labels = held(split)
    unseen = labels[split.training :]
    assert len(set(unseen)) == 5
    assert not set(unseen) & set(labels[: split.training])
    assert len(set(labels[5 : split.training])) == 5
    assert len({tuple(split.samples[client].tolist()) for client in split.unseen_ids}) == 8


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from([0.3, 1.0, 100.0]), st.sampled_from([0, 50, 100]))
def test_dirichlet(seed: int, alpha: float, samples: int) -> None:
    """Every (client, class) cell is rounded, so the total differs from the budget by half a sample a cell at most."""
    clients = 8
    config, split = make(
        name="dirichlet", run__seed=seed, alpha=alpha, clients=clients, unseen_clients=3, samples_per_client=samples,
    )  # fmt: skip
    check_frame(config, split)
    assert min(map(len, split.samples)) >= 8
    total = sum(len(split.samples[client]) for client in range(clients))
    assert abs(total - (samples * clients or len(TRAIN))) <= clients * CLASSES / 2
    assert abs(sum(len(split.samples[client]) for client in split.unseen_ids) - len(TEST)) <= 3 * CLASSES / 2


def test_dirichlet_concentration() -> None:
    """A small alpha gives clients few classes, a large one gives all the same share."""
    shares = {}
    for alpha in (0.2, 1000.0):
        _, split = make(name="dirichlet", alpha=alpha, clients=8, unseen_clients=3, samples_per_client=200)
        counts = [np.bincount(TRAIN[rows], minlength=CLASSES) / len(rows) for rows in split.samples[:8]]
        shares[alpha] = float(np.mean([c.max() for c in counts]))
    assert shares[0.2] > 0.3
    assert shares[1000.0] < 0.15


# Validation clients ---------------------------------------------------------------------------------------------------

VALIDATED: dict[str, Scalar] = {
    "public_share": 0.5, "validation_clients": 2, "clients": 14, "unseen_clients": 3, "alpha": 1.0,
    "moe__experts": 5, "samples_per_client": 40, "unseen_samples": 20,
}  # fmt: skip


@pytest.mark.parametrize("name", ["quantity", "label-groups", "dirichlet", "domains"])
@pytest.mark.parametrize("seed", range(3))
def test_validation_clients_hold_public_samples_that_train_nobody(name: str, seed: int) -> None:
    config, split = make(**VALIDATED | {"name": name, "run__seed": seed})
    assert list(split.validation_ids) == [17, 18]
    assert len(split.samples) == config.partition.all_clients == 19
    public = public_samples(config, len(TRAIN))
    spared = set(held_out(public).tolist())
    assert len(spared) == len(public) // 5 == len(TRAIN) // 10
    for client, rows in enumerate(split.samples):
        if client in split.validation_ids:
            assert set(rows.tolist()) <= spared
        elif client not in split.unseen_ids:
            assert not set(rows.tolist()) & set(public.tolist())


@pytest.mark.parametrize("name", ["quantity", "label-groups"])
@pytest.mark.parametrize("seed", range(5))
def test_validation_clients_have_label_combinations_that_nobody_else_has(name: str, seed: int) -> None:
    _, split = make(**VALIDATED | {"name": name, "run__seed": seed})
    labels = [
        frozenset((TEST if client in split.unseen_ids else TRAIN)[rows].tolist())
        for client, rows in enumerate(split.samples)
    ]
    unseen, validation = labels[14:17], labels[17:]
    assert len(set(validation)) == 2
    assert not set(validation) & set(labels[:17])
    assert not set(unseen) & set(labels[:14])


@pytest.mark.parametrize("name", ["dirichlet", "domains"])
def test_all_others_are_as_they_are_without_validation_clients(name: str) -> None:
    """Where no combination must be kept out of training; there, the unseen clients' combinations are."""
    _, without = make(**VALIDATED | {"name": name, "validation_clients": 0})
    _, split = make(**VALIDATED | {"name": name})
    assert all(np.array_equal(a, b) for a, b in zip(without.samples, split.samples[:17], strict=True))
    assert not len(without.validation_ids)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_validation_clients_need_public_samples_of_all_classes(share: float) -> None:
    with pytest.raises(FedjetsError, match=r"^partition\.validation-clients = 2: .* partition\.public-share = 0"):
        make(**VALIDATED | {"public_share": share})


def test_clients_that_would_share_a_combination_are_refused_by_the_setting_that_asks_for_them() -> None:
    """Ten pairs of five groups: five for the unseen clients, of the other five two can be kept out of training."""
    asked = {"name": "label-groups", "unseen_clients": 5, "unseen_samples": 0, "validation_clients": 3}
    with pytest.raises(FedjetsError, match=r"^partition\.validation-clients = 3: 2 label combinations"):
        make(**VALIDATED | asked)


def test_roles_follow_each_other() -> None:
    part = make(**VALIDATED)[0].partition
    assert [part.role_of(client) for client in (0, 13, 14, 16, 17, 18)] == [
        "train", "train", "unseen", "unseen", "validation", "validation",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["quantity", "label-groups", "dirichlet"])
def test_a_seed_decides_the_split(name: str) -> None:
    def rows(seed: int) -> list[list[int]]:
        return [r.tolist() for r in make(name=name, run__seed=seed, alpha=1.0)[1].samples]

    first = rows(3)
    np.random.default_rng().random()
    assert rows(3) == first
    assert rows(4) != first


def test_zero_samples_is_an_equal_share_of_each_label() -> None:
    """A label of 60 samples with h holders gives 60 // h to each, without repeats within a client."""
    _, split = make(name="quantity", clients=12, labels_per_client=4, samples_per_client=0)
    labels = held(split)[: split.training]
    holders = Counter(label for group in labels for label in group)
    for group, rows in zip(labels, split.samples, strict=False):
        assert len(set(rows.tolist())) == len(rows)
        assert Counter(TRAIN[rows].tolist()) == {label: TRAIN_PER_CLASS // holders[label] for label in group}


def test_clients_share_samples_but_do_not_repeat_them() -> None:
    _, split = make(name="quantity", clients=30, labels_per_client=4, samples_per_client=100)
    training = [set(rows.tolist()) for rows in split.samples[:30]]
    assert all(len(rows) == 100 for rows in training)
    assert any(a & b for i, a in enumerate(training) for b in training[:i])


def test_a_label_that_is_too_small_is_drawn_with_replacement() -> None:
    _, split = make(name="quantity", labels_per_client=2, samples_per_client=300)
    assert all(len(rows) == 300 and len(set(rows.tolist())) <= 2 * TRAIN_PER_CLASS for rows in split.samples[:20])


@given(st.integers(1, 30), st.integers(0, 2**32), st.data())
def test_anchor_groups(classes: int, seed: int, data: st.DataObject) -> None:
    anchors = data.draw(st.integers(1, classes))
    groups = anchor_groups(classes, anchors, np.random.default_rng(seed))
    assert sorted(label for group in groups for label in group) == list(range(classes))
    assert len(groups) == anchors
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize(
    ("name", "changes", "setting"),
    [
        ("quantity", {"unseen_clients": 300}, "partition.unseen-clients = 300"),
        ("quantity", {"labels_per_client": 10}, "partition.labels-per-client = 10"),
        ("quantity", {"labels_per_client": 11}, "partition.labels-per-client = 11"),
        ("quantity", {"moe__experts": 11}, "partition.anchors = 11"),
        ("label-groups", {"moe__experts": 11}, "partition.anchors = 11"),
        ("label-groups", {"unseen_clients": 10}, "partition.unseen-clients = 10"),
        ("label-groups", {"labels_per_client": 3}, "partition.labels-per-client = 3"),
        ("label-groups", {"labels_per_client": 12}, "partition.labels-per-client = 12"),
        ("label-groups", {"labels_per_client": 4, "moe__experts": 4}, "partition.labels-per-client = 4"),
        ("dirichlet", {"alpha": 0.001, "clients": 40, "samples_per_client": 10}, "partition.alpha = 0.001"),
        ("quantity", {"clients": 700, "samples_per_client": 0}, "partition.samples-per-client = 0"),
    ],
)
def test_what_cannot_be_split_names_its_setting(name: str, changes: dict[str, Scalar], setting: str) -> None:
    with pytest.raises(FedjetsError) as caught:
        make(name=name, **changes)
    assert str(caught.value).startswith(setting)
    assert "\n" not in str(caught.value)


def test_fewer_samples_than_labels_is_refused() -> None:
    with pytest.raises(FedjetsError, match=r"^partition\.samples-per-client = 3"):
        make(name="quantity", labels_per_client=4, samples_per_client=3)


def test_a_label_may_be_held_by_any_number_of_reserved_combinations() -> None:
    """Balance counts how often a label was taken more than another, not how often at all."""
    units = [frozenset([label]) for label in range(26)]
    found = _reserve(units, 13, 1200, [], np.random.default_rng(0))
    used = Counter(label for labels in found for label in labels)
    assert len(set(found)) == 1200
    assert max(used.values()) - min(used.values()) <= 12
