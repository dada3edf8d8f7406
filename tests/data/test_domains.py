"""How images look: each change by hand, who holds which, and that nothing depends on who asks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client, open_dataset, open_split
from fedjets_flwr.data.domains import KINDS, domains_held, parse_domain
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.tasks import open_task

DIGITS: dict[str, Scalar] = {
    "partition.name": "domains", "partition.clients": 12, "partition.unseen-clients": 7,
    "partition.labels-per-client": 10,
    "partition.samples-per-client": 40, "partition.unseen-samples": 20, "moe.experts": 5,
}  # fmt: skip


def config(**changes: Scalar) -> Config:
    return Config.from_flat(DIGITS | {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()})


def pictures(count: int = 3, channels: int = 3, size: int = 32) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def looks(name: str, pixels: Tensor, seed: int = 1) -> Tensor:
    return parse_domain(name).of(pixels, range(len(pixels)), seed)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_a_domain_keeps_shape_and_kind_and_is_the_same_each_time(name: str, channels: int, size: int) -> None:
    pixels = pictures(4, channels, size)
    before = pixels.clone()
    found = looks(name, pixels)
    assert (found.shape, found.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(found, looks(name, pixels))
    assert torch.equal(pixels, before)
    changed = not torch.equal(found, pixels)
    assert changed == (name != "as-is" and (name, channels) != ("grey", 1))
    # Each image alone, whoever else is asked for along with it.
    assert torch.equal(found[2:3], parse_domain(name).of(pixels[2:3], [2], 1))


def test_rotations_negative_and_contrast_by_hand() -> None:
    pixels = torch.tensor([[[[0, 10], [20, 30]]]], dtype=torch.uint8)
    assert looks("rotate-90", pixels).flatten().tolist() == [10, 30, 0, 20]
    assert looks("rotate-180", pixels).flatten().tolist() == [30, 20, 10, 0]
    assert looks("rotate-270", pixels).flatten().tolist() == [20, 0, 30, 10]
    assert looks("negative", pixels).flatten().tolist() == [255, 245, 235, 225]
    assert looks("contrast:2", pixels).flatten().tolist() == [8, 12, 18, 22]  # half way to the mean, 15; halves to even


def test_noise_has_the_deviation_of_its_strength_and_is_drawn_for_each_image_and_seed() -> None:
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    found = looks("noise=0.1", grey).float() - 128
    assert float(found.std()) == pytest.approx(25.5, rel=0.03)
    assert float(found.mean()) == pytest.approx(0, abs=1)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found, looks("noise=0.1", grey, seed=2).float() - 128)


def test_severities_grow() -> None:
    pixels = pictures()
    for name in ("noise", "blur", "contrast", "jpeg"):
        far = [float((looks(f"{name}:{severity}", pixels).float() - pixels).abs().mean()) for severity in range(1, 6)]
        assert far == sorted(far)
        assert far[0] < far[-1]
        assert torch.equal(looks(name, pixels), looks(f"{name}:5", pixels))


@pytest.mark.parametrize(
    "wrong",
    [
        "fog",
        "blur:6",
        "blur:0",
        "blur:x",
        "noise=-1",
        "noise=",
        "negative:2",
        "rotate-90=45",
        "jpeg=0.5",
        "jpeg=60.7",
        "",
    ],
)
def test_what_is_no_domain_is_refused_by_its_name(wrong: str) -> None:
    with pytest.raises(FedjetsError, match=r"^partition\.domains: "):
        parse_domain(wrong)


def test_a_domain_that_is_none_is_told_before_the_run() -> None:
    with pytest.raises(FedjetsError, match=r"^partition\.domains: 'fog': no such domain"):
        open_split(config(partition__domains="as-is,fog"))


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"partition__domains": "as-is"}, "partition.domains"),
        ({"partition__domains": "as-is,blur,blur"}, "partition.domains"),
        ({"partition__held_out_domain": "fog"}, "partition.held-out-domain"),
        ({"partition__unseen_domains": 6}, "partition.unseen-domains"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Scalar], setting: str) -> None:
    with pytest.raises(FedjetsError, match=rf"^{setting} = "):
        config(**changes)


def test_anchors_hold_one_domain_each_and_everybody_else_one_in_turn() -> None:
    assert [domains_held(config(), client) for client in range(12)] == [(client % 5,) for client in range(12)]
    assert [domains_held(config(), client) for client in range(12, 19)] == [(u % 5,) for u in range(7)]


def test_nobody_trains_on_a_domain_that_is_held_out_and_all_unseen_clients_hold_it() -> None:
    out = config(partition__held_out_domain="negative", moe__experts=4, partition__anchors=4, cohort__anchors=4)
    assert {domains_held(out, client) for client in range(12)} == {(0,), (1,), (3,), (4,)}
    assert [domains_held(out, client) for client in range(4)] == [(0,), (1,), (3,), (4,)]
    assert {domains_held(out, client) for client in range(12, 19)} == {(2,)}


@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 80))
def test_an_unseen_mixture_is_of_different_domains(count: int, wanted: int, unseen: int) -> None:
    names, mixed = ",".join(list(KINDS)[:count]), min(wanted, count)
    held = domains_held(config(partition__domains=names, partition__unseen_domains=mixed), 12 + unseen)
    assert len(set(held)) == len(held) == mixed
    assert all(0 <= domain < count for domain in held)


def test_mixtures_differ_between_unseen_clients() -> None:
    mixed = config(partition__unseen_domains=2, partition__unseen_clients=20)
    assert len({frozenset(domains_held(mixed, client)) for client in range(12, 32)}) == 10  # all pairs of five


@pytest.mark.parametrize("unseen", [1, 4, 5, 7, 9])
def test_validation_clients_have_mixtures_of_their_own_and_no_domain_that_is_held_out(unseen: int) -> None:
    mixed = config(partition__unseen_domains=2, partition__unseen_clients=unseen, partition__validation_clients=5)
    ordered = [domains_held(mixed, client) for client in range(12, 17 + unseen)]
    assert not set(ordered[unseen:]) & set(ordered[:unseen])
    assert [first for first, _ in ordered[unseen:]] == [0, 1, 2, 3, 4]
    one = config(partition__unseen_clients=unseen, partition__validation_clients=5)
    assert [domains_held(one, 12 + unseen + v) for v in range(5)] == [(v,) for v in range(5)]
    out = one.model_copy(update={"partition": one.partition.model_copy(update={"held_out_domain": "negative"})})
    assert [domains_held(out, 12 + unseen + v) for v in range(5)] == [(0,), (1,), (3,), (4,), (0,)]
    assert {domains_held(out, 12 + u) for u in range(unseen)} == {(2,)}


def test_a_client_holds_its_share_of_images_as_they_look_there() -> None:
    settings = config(partition__unseen_domains=2)
    dataset, split = open_dataset(settings), open_split(settings)
    anchor = open_client(settings, 2)
    assert torch.equal(anchor.images.pixels, 255 - dataset.train.pixels[torch.from_numpy(split.samples[2])])
    assert anchor.images.domains is not None
    assert anchor.images.domains.tolist() == [2] * 40
    assert torch.bincount(anchor.images.labels).tolist() == [4] * 10
    mixed = open_client(settings, 13)  # rotate-90 and negative in turn
    assert mixed.images.domains is not None
    assert mixed.images.domains.tolist() == [1, 2] * 10
    plain = dataset.test.pixels[torch.from_numpy(split.samples[13])]
    assert torch.equal(mixed.images.pixels[1::2], 255 - plain[1::2])
    assert torch.equal(mixed.images.pixels[0::2], torch.rot90(plain[0::2], 1, (2, 3)))


def test_labels_can_be_skewed_besides_and_anchors_keep_all() -> None:
    skewed = config(partition__labels_per_client=4)
    held = [set(open_client(skewed, client).images.labels.tolist()) for client in range(19)]
    assert [len(labels) for labels in held] == [10] * 5 + [4] * 14
    assert len(set(map(frozenset, held[5:]))) > 5


def test_experts_are_told_apart_by_domains_not_classes() -> None:
    task = open_task(config())
    assert task.spec.columns == ("as-is", "rotate-90", "negative", "noise=0.157", "blur=1.6")
    samples = task.samples(3)
    assert samples.columns.tolist() == [3] * 40
    assert samples.first(7).columns.tolist() == [3] * 7
    plain = open_task(Config.from_flat({}))
    assert plain.spec.columns == plain.spec.classes
    assert torch.equal(plain.samples(0).columns, plain.samples(0).targets)
