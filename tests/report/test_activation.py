"""Which experts a domain's texts activate, and who holds what, as a run's results tell it."""

from typing import Any

import numpy as np

from fedjets_flwr.report.activation import by_domain, holders

RESULTS: dict[str, Any] = {
    "kinds": ["tales", "code"],
    "experts_held": {"10": [[0], [1]], "2": [[0, 1], [0]], "3": [[1], [1]], "0": [[1], [0]]},
    "activation": {
        "10": [[1.0, 0.0], [0.0, 1.0]], "2": [[0.5, 0.5], [1.0, 0.0]], "3": [[0.0, 1.0], [0.0, 1.0]],
    },
    "domain_of": {"10": 0, "2": 0, "3": 1},
}  # fmt: skip


def test_those_of_a_domain_stand_together_and_an_unknown_one_last() -> None:
    assert [(holder.client, holder.domain) for holder in holders(RESULTS)] == [
        ("2", "tales"), ("10", "tales"), ("3", "code"), ("0", "unknown"),
    ]  # fmt: skip
    assert holders(RESULTS)[1].held == [[0], [1]]


def test_a_domain_s_activation_is_the_mean_of_its_clients() -> None:
    found = by_domain(RESULTS)
    assert list(found) == ["tales", "code"]
    np.testing.assert_array_equal(found["tales"], [[0.75, 0.25], [0.5, 0.5]])
    np.testing.assert_array_equal(found["code"], [[0.0, 1.0], [0.0, 1.0]])


def test_runs_that_tell_nothing_of_it_and_damaged_ones_show_nothing() -> None:
    assert by_domain({}) == {} and holders({}) == []
    assert by_domain({"activation": {"0": []}}) == {}
    assert list(by_domain({"activation": {"0": [[1.0]], "1": [[0.5, 0.5]]}})) == ["unknown"]
    assert [h.domain for h in holders({"experts_held": {"0": [[0]]}, "domain_of": {"0": 7}, "kinds": ["a"]})] == [
        "unknown"
    ]
