"""The sentence on a run: success and failure alike, and no word of success within error."""

import math

import pytest

from fjax.runs.aim import Aim
from fjax.runs.verdict import verdict

AIM = Aim(
    headlines=("share of women", "win_rate", "satisfaction", "reward"),
    objective="jensen_shannon",
    at_most={"forward_kl": None, "jensen_shannon": 0.693},
)


def record(*, ess: float = 50.0, **figures: tuple[float, float]) -> dict:
    """Name -> (value, standard error)."""
    found = {}
    for name, (value, error) in figures.items():
        found |= {name: value, f"{name}_std_error": error, f"{name}_ess": ess}
    return found


BASE = {
    "satisfaction": (0.0133, 0.004),
    "forward_kl": (4.38, 0.2),
    "entropy": (87.0, 1.0),
    "length": (23.0, 0.2),
}


def said(first: dict, last: dict, of_p: dict | None = None) -> list[str]:
    of_p = None if of_p is None else record(**of_p)
    return verdict(record(**first), record(**last), AIM, of_p).removesuffix(".").split("; ")


def test_a_success():
    after = {"satisfaction": (0.85, 0.01), "forward_kl": (1.94, 0.05), "entropy": (85.0, 1.0)}
    assert said(BASE, BASE | after) == [
        "satisfaction 0.013 → 0.85",
        "1.9 of 4.4 nats from the target left",
        "samples as long and as varied as before",
    ]


def test_a_run_that_says_the_word_and_forgets_the_language():
    after = {
        "satisfaction": (0.87, 0.01),
        "forward_kl": (13.65, 0.34),
        "entropy": (34.0, 0.7),
        "length": (11.4, 0.2),
    }
    assert said(BASE, after, {"entropy": (88.7, 1.0), "length": (24.8, 0.2)}) == [
        "satisfaction 0.013 → 0.87",
        "further from the target than before: 13.7 after 4.4 nats",
        "samples much shorter and much less varied than p's (11.4 of 25 tokens, "
        "34 of 89 nats of entropy)",
    ]


def test_what_is_within_two_standard_errors_is_no_change():
    after = {"satisfaction": (0.0213, 0.004), "forward_kl": (3.9, 0.2), "length": (30.0, 3.8)}
    assert said(BASE, BASE | after) == [
        "satisfaction 0.013 → 0.021, the same within error",
        "no nearer to the target within error: 3.9 after 4.4 nats",
        "samples as long and as varied as before",
    ]
    further = {"satisfaction": (0.0263, 0.004), "forward_kl": (3.8, 0.2), "length": (31.0, 3.8)}
    assert said(BASE, BASE | further) == [
        "satisfaction 0.013 → 0.026",
        "3.8 of 4.4 nats from the target left",
        "samples longer than before (31 of 23 tokens)",
    ]


def test_an_unknown_error_is_no_success():
    assert said(BASE, {"satisfaction": (0.9, math.nan)})[0].endswith("the same within error")


@pytest.mark.parametrize("how", [{"ess": 3.0}, {"pareto_k": (0.71, math.nan)}])
def test_what_rests_on_too_little_is_no_success(how):
    after = record(forward_kl=(1.0, 0.1), satisfaction=(0.9, 0.01), **how)
    found = verdict(record(**BASE), after, AIM)
    assert "how far from the target rests on too few samples (4.4 → 1.0 nats)" in found


def test_without_the_forward_kl_the_objective_says_how_far():
    first, last = {"jensen_shannon": (0.66, 0.01)}, {"jensen_shannon": (0.31, 0.01)}
    infinite = {"forward_kl": (math.inf, math.inf)}
    expected = ["0.31 of 0.66 in JS(π, p) from the target left"]
    assert said(first, last) == said(first | infinite, last) == expected
    assert said(first | infinite, infinite) == ["how far from the target is unknown"]


@pytest.mark.parametrize(
    ("name", "first", "last", "expected"),
    [
        ("reward", -0.434, 1.26, "reward -0.43 → 1.3"),
        ("reward", 1.26, -0.434, "reward 1.3 → -0.43"),
        ("win_rate", 0.5, 0.71, "win rate over the base 0.50 → 0.71"),
        ("share of women", 0.23, 0.48, "share of women 0.23 → 0.48"),
    ],
)
def test_what_the_run_is_about(name, first, last, expected):
    assert said({name: (first, 0.01)}, {name: (last, 0.01)}) == [expected]


def test_where_nothing_is_known_nothing_is_said():
    assert verdict({}, {}, Aim()) == ""
    assert verdict(record(entropy=(0.0, 0.0)), record(entropy=(0.0, 0.0)), AIM) == ""
