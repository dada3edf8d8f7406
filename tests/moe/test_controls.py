"""The controls: every correction of the common expert, and which of them counts."""

from fedjets_flwr.moe.controls import CONTROLS, FREE, best_control, mean_controls, shown


def test_every_correction_is_a_control_with_and_without_adabn() -> None:
    assert list(CONTROLS.items()) == [
        ("common_expert", "common expert"),
        ("common_expert_em", "common expert + EM"),
        ("common_expert_support", "common expert + EM's support"),
        ("common_expert_map", "common expert + MAP-EM"),
        ("common_expert_masked", "common expert + classes known"),
        ("common_expert_adabn", "common expert + AdaBN"),
        ("common_expert_adabn_em", "common expert + AdaBN + EM"),
        ("common_expert_adabn_support", "common expert + AdaBN + EM's support"),
        ("common_expert_adabn_map", "common expert + AdaBN + MAP-EM"),
        ("common_expert_adabn_masked", "common expert + AdaBN + classes known"),
    ]
    assert set(CONTROLS) - set(FREE) == {"common_expert_masked", "common_expert_adabn_masked"}


def test_the_best_control_reads_no_label() -> None:
    controls: dict[str, float | None] = {
        "common_expert": 0.5, "common_expert_em": 0.6, "common_expert_adabn": 0.7, "common_expert_masked": 0.9,
    }  # fmt: skip
    assert best_control(controls) == "common_expert_adabn"
    assert shown(controls) == ["common_expert", "common_expert_em", "common_expert_adabn", "common_expert_masked"]
    assert best_control({**controls, "common_expert_adabn": None}) == "common_expert_em"
    assert best_control(dict.fromkeys(CONTROLS)) == "common_expert"
    assert shown(dict.fromkeys(CONTROLS)) == []


def test_means_are_of_what_all_runs_measured() -> None:
    older = {"common_expert": 0.5, "common_expert_em": 0.7}
    assert mean_controls([older, {"common_expert": 0.7, "common_expert_em": 0.9, "common_expert_map": 0.1}]) == {
        "common_expert": 0.6, "common_expert_em": 0.8,
    }  # fmt: skip
