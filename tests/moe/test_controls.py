"""The controls: every correction of the common expert, and which of them counts."""

import torch

from fedjets_flwr.moe.controls import (
    CONTROLS,
    FREE,
    best_bound,
    best_control,
    mean_controls,
    measured,
    right_by_control,
    shown,
)
from fedjets_flwr.moe.label_prior import em_prior, with_prior
from fedjets_flwr.moe.metrics import PRIORS, right_predictions


def test_every_correction_is_a_control_with_and_without_adabn() -> None:
    assert list(CONTROLS.items()) == [
        ("common_expert", "common expert"),
        ("common_expert_em", "common expert + EM"),
        ("common_expert_support", "common expert + EM's support"),
        ("common_expert_map", "common expert + MAP-EM"),
        ("common_expert_masked", "common expert + classes known"),
        ("common_expert_tempered", "common expert + tempered EM"),
        ("common_expert_groups", "common expert + likeliest groups"),
        ("common_expert_adabn", "common expert + AdaBN"),
        ("common_expert_adabn_em", "common expert + AdaBN + EM"),
        ("common_expert_adabn_support", "common expert + AdaBN + EM's support"),
        ("common_expert_adabn_map", "common expert + AdaBN + MAP-EM"),
        ("common_expert_adabn_masked", "common expert + AdaBN + classes known"),
        ("common_expert_adabn_tempered", "common expert + AdaBN + tempered EM"),
        ("common_expert_adabn_groups", "common expert + AdaBN + likeliest groups"),
    ]
    assert set(CONTROLS) - set(FREE) == {"common_expert_masked", "common_expert_adabn_masked"}


def test_the_best_control_reads_no_label() -> None:
    controls: dict[str, float | None] = {
        "common_expert": 0.5, "common_expert_em": 0.6, "common_expert_adabn": 0.7, "common_expert_masked": 0.9,
    }  # fmt: skip
    assert best_control(controls) == "common_expert_adabn"
    assert shown(controls) == ["common_expert", "common_expert_em", "common_expert_adabn", "common_expert_masked"]
    assert best_control({**controls, "common_expert_adabn": None}) == "common_expert_em"
    assert best_bound(controls) == "common_expert_masked"
    adapted = {**controls, "common_expert_adabn_masked": 0.95}
    assert best_bound(adapted) == shown(adapted)[-1] == "common_expert_adabn_masked"
    assert best_control(dict.fromkeys(CONTROLS)) == "common_expert"
    assert shown(dict.fromkeys(CONTROLS)) == []


def test_means_are_of_what_all_runs_measured() -> None:
    older = {"common_expert": 0.5, "common_expert_em": 0.7}
    assert mean_controls([older, {"common_expert": 0.7, "common_expert_em": 0.9, "common_expert_map": 0.1}]) == {
        "common_expert": 0.6, "common_expert_em": 0.8,
    }  # fmt: skip


def test_what_a_client_gets_right_is_told_by_control() -> None:
    """Two kinds of statistics, each with every prior, then tempered EM and the mask of groups, in that order."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (200,), generator=generator)
    plain = torch.randn(200, 4, generator=generator) + 0.5 * torch.eye(4)[labels]
    adapted = plain + torch.eye(4)[labels]
    groups = [frozenset({2, 3}), frozenset({0, 1})]
    found = dict(zip(CONTROLS, right_by_control([plain, adapted], labels, 0.5, groups, 1), strict=True))
    for logits, own in ((plain, ""), (adapted, "_adabn")):
        wanted = [found[f"common_expert{own}{'' if prior == 'none' else '_' + prior}"] for prior in PRIORS]
        assert wanted == right_predictions(logits.softmax(1), labels)
        tempered = (logits.double() / 0.5).softmax(1)
        corrected = with_prior(tempered, em_prior(tempered)).argmax(1)
        assert found[f"common_expert{own}_tempered"] == int((corrected == labels).sum())
        assert found[f"common_expert{own}_groups"] == int((logits[:, :2].argmax(1) == labels).sum())
    assert len(set(found.values())) > 6
    without = dict(zip(CONTROLS, right_by_control([plain, adapted], labels, 1.0, [], 0), strict=True))
    assert without["common_expert_groups"] == without["common_expert"]
    assert without["common_expert_tempered"] == without["common_expert_em"]


def test_controls_that_would_repeat_others_are_not_told() -> None:
    assert measured(0.7, [{0}]) == list(CONTROLS)
    assert set(CONTROLS) - set(measured(1.0, [{0}])) == {"common_expert_tempered", "common_expert_adabn_tempered"}
    assert set(CONTROLS) - set(measured(0.7, [])) == {"common_expert_groups", "common_expert_adabn_groups"}
