"""What a setting allows is written by hand beside its meaning; what there is, in a registry. One holds the other."""

from collections.abc import Iterable
from typing import Literal, get_args, get_origin

import pytest
from torch import nn

from client_app.algorithms.fedmoe import PROBES
from client_app.attacks import ATTACKS
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Section, kebab
from fedjets_flwr.data.datasets import LOADERS
from fedjets_flwr.data.partition import PARTITIONS
from fedjets_flwr.data.transforms import AUGMENTATIONS
from fedjets_flwr.federation.aggregation import RULES
from fedjets_flwr.federation.anchors import SELECTIONS
from fedjets_flwr.models.architectures import BUILDERS, tail_start
from fedjets_flwr.moe.gating import MIXES, READ_OUTS
from fedjets_flwr.moe.metrics import PRIORS, STATISTICS
from fedjets_flwr.moe.mixture import COMMON
from fedjets_flwr.moe.representation import FORMS
from fedjets_flwr.moe.specialist import MIXES as MIXTURES
from fedjets_flwr.moe.specialist import TRAINED
from fedjets_flwr.personalize.bundle import Card
from fedjets_flwr.tasks import OF_TEXT
from fedjets_flwr.wire.transport import WIDTHS


def allowed() -> dict[str, tuple[object, ...]]:
    """Every setting that takes one of some texts, as ``section.name``."""
    found = {}
    for section, outer in Config.model_fields.items():
        model = outer.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        for name, field in model.model_fields.items():
            if get_origin(field.annotation) is Literal and isinstance(get_args(field.annotation)[0], str):
                found[f"{kebab(section)}.{kebab(name)}"] = get_args(field.annotation)
    return found


REGISTRIES: dict[str, Iterable[str]] = {
    "data.name": [*LOADERS, "image-folder", *OF_TEXT],
    "data.augment": AUGMENTATIONS,
    "partition.name": PARTITIONS,
    "model.name": BUILDERS,
    "moe.mix": ["", *MIXES],
    "cohort.anchor-selection": ["partition", *SELECTIONS],
    "aggregation.rule": ["mean", *RULES],
    "attack.kind": ["none", *ATTACKS],
    "transport.dtype": WIDTHS,
    "personalize.read-out": ["", *READ_OUTS],
    "specialist.mix": MIXTURES,
    "specialist.trains": TRAINED,
    "fedsr.l2-form": FORMS,
    "fedmoe.probe": ["none", *PROBES],
}

SWITCHES = {
    "run.device", "model.norm", "model.stem", "common-expert.embedding", "moe.trainable", "moe.init", "gate.mode",
    "gate.learns-from", "train.precision",
    "train.schedule", "scaffold.option", "fedmix.weighting", "cohort.sampling", "aggregation.weighting",
    "aggregation.bn", "transport.name", "personalize.prior", "personalize.statistics", "specialist.start",
    "specialist.gate", "partition.pairs", "fedadg.reference", "text.tokens",
    "train.optimizer", "adapt.start", "fedmoe.counts",
}  # fmt: skip
"""Settings whose few values are branches of one function each, and no registry's."""


@pytest.mark.parametrize("setting", REGISTRIES)
def test_a_setting_allows_what_its_registry_has(setting: str) -> None:
    assert set(allowed()[setting]) == set(REGISTRIES[setting])


def test_every_setting_of_some_texts_is_held_against_a_registry_or_is_a_switch() -> None:
    assert set(allowed()) == set(REGISTRIES) | SWITCHES


def test_a_bundle_allows_what_the_settings_allow() -> None:
    settings = allowed()
    for field, setting in (
        ("read_out", "personalize.read-out"), ("prior", "personalize.prior"), ("trainable", "moe.trainable"),
        ("embedding", "common-expert.embedding"),
    ):  # fmt: skip
        # Which expert is surest, and whether the common one is kept, is settled when a bundle is made.
        allowed_here = set(get_args(Card.model_fields[field].annotation)) - {COMMON}
        assert allowed_here == set(settings[setting]) - {"", "surest", "familiar"}


def test_switches_that_a_table_decides() -> None:
    settings, model = allowed(), nn.Sequential(*[nn.Identity()] * 5)
    assert [tail_start(model, str(trainable)) for trainable in settings["moe.trainable"]] == [0, 2, 4]
    assert set(settings["personalize.prior"]) == set(PRIORS) - {"masked"}  # which knows labels
    assert settings["personalize.statistics"] == STATISTICS
