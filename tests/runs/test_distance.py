"""Distances of one unit, and what is said of a bound that figures must obey."""

import math

import numpy as np
import pytest

from fjax.estimators import Estimate
from fjax.evaluation import Evaluation
from fjax.runs.display import _verdict
from fjax.runs.distance import Check, check_bound, distances


def records(*pairs, name="reverse_kl"):
    return {10 * i: {name: value, "total_variation": tv} for i, (value, tv) in enumerate(pairs)}


def test_distances_are_of_one_unit():
    """B17: once infinite, TV in all; a finite reverse KL beside a TV of another step says
    nothing."""
    infinite = records((math.inf, 0.60), (math.inf, 0.35), (1.4, 0.20), (0.9, 0.12), (0.6, 0.08))
    unit, known = distances(infinite, "reverse_kl")
    assert unit == "total_variation"
    assert known == {0: 0.60, 10: 0.35, 20: 0.20, 30: 0.12, 40: 0.08}
    unit, known = distances(records((1.4, 0.1), (0.9, 0.2)), "reverse_kl")
    assert (unit, known) == ("reverse_kl", {0: 1.4, 10: 0.9})


def test_what_is_unknown_is_no_distance():
    unknown = records((math.nan, math.nan), (0.4, 0.3), (math.nan, math.nan))
    assert distances(unknown, "reverse_kl") == ("reverse_kl", {10: 0.4})
    assert distances({}, "reverse_kl") == ("reverse_kl", {})


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (Check(2.5, 2.0, 0.1), "2.500 ≥ 2.000 holds."),
        (Check(2.0, 2.0 + 1e-6, 0.0), "holds."),  # the same number twice, but for rounding
        (Check(1.690, 1.946, 0.1), "1.690 is below 1.946, within error (± 0.100)."),
        (Check(1.690, 1.946, 0.07), "within error"),  # 3.7 standard errors
        (Check(1.690, 1.946, 0.06), "it FAILS"),
        (Check(1.690, 1.946, math.inf), "within error"),
        (Check(math.nan, math.inf, math.inf), "nothing to check"),
    ],
)
def test_a_check_says_holds_only_where_it_does(check, expected):
    """B15: "1.690 ≥ 1.946 holds" was printed."""
    said = _verdict(check)
    assert expected in said
    assert ("holds" in said) == (check.least - check.forward_kl < 1e-4)


def test_where_there_is_no_bound_nothing_is_checked():
    half = Estimate(0.5, 0.1, 9.0)
    rate = Estimate(np.log([0.25]), np.zeros(1), np.ones(1))
    by_context = {"forward_kl": Estimate(*(np.array([x]) for x in half)), "log_rate": rate}
    figures = {"forward_kl": half, "satisfaction": Estimate(0.25, 0.05, 9.0)}
    found = Evaluation(figures, None, None, by_context)
    assert check_bound(found, None) is None
    assert check_bound(found._replace(figures={"satisfaction": half}), "satisfaction") is None
    expected = Check(0.5, -math.log(0.25), math.hypot(0.1, 0.05 / 0.25))
    assert check_bound(found, "satisfaction") == expected
    never = figures | {"satisfaction": Estimate(0.0, 0.0, 9.0)}
    least = check_bound(found._replace(figures=never), "satisfaction").least
    assert least == math.inf
