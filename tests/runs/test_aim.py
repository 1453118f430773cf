"""What a run is after: taken from a target, kept in config.json, and unknown of an old run."""

import json
import math

import pytest

from fjax.divergences import by_name
from fjax.evaluation import TextTarget
from fjax.runs.aim import Aim, aim_of, most_of, read_aim

TARGET = TextTarget(lambda *_: {}, lambda *_: None)
DIVERGENCES = {name: by_name(name) for name in ("reverse_kl", "total_variation")}


def test_it_is_the_same_when_read_again():
    target = TARGET._replace(
        headline="balance", ratios={"share": ("a", "b")}, wins="balance", description="p",
        highlight="great",
    )  # fmt: skip
    aim = aim_of(target, DIVERGENCES, "total_variation")
    assert aim.headlines == ("share", "win_rate", "balance")
    assert aim.at_most == {"reverse_kl": None, "total_variation": 1.0}
    read = read_aim(json.loads(json.dumps({"aim": aim._asdict()})))
    assert read._replace(headlines=tuple(read.headlines)) == aim


@pytest.mark.parametrize(
    ("config", "objective"),
    [
        ({"objective": "alpha=0.5", "title": "x"}, "alpha=0.5"),
        ({"divergence": "reverse_kl"}, "reverse_kl"),
        ({}, ""),
    ],
)
def test_of_an_old_run_little_is_known(config, objective):
    assert read_aim(config) == Aim(objective=objective)


def test_what_a_newer_version_wrote_is_passed_over():
    assert read_aim({"aim": {"target": "p", "mood": "fine"}}) == Aim("p")


def test_bad_input():
    with pytest.raises(ValueError, match=r"objective must be one of .*, got 'x'"):
        aim_of(TARGET, DIVERGENCES, "x")
    with pytest.raises(
        ValueError, match=r"highlight must be a regular expression, got '\(' \(miss"
    ):
        aim_of(TARGET._replace(highlight="("), DIVERGENCES, "reverse_kl")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("jensen_shannon", math.log(2)),
        ("total_variation", 1.0),
        ("squared_hellinger", 2.0),
        ("alpha=0.5", 4.0),
        ("generalized_jensen_shannon=0.1", None),
        ("forward_kl", None),
        ("reverse_kl", None),
        ("pearson_chi2", None),
    ],
)
def test_the_most_a_divergence_can_be_is_that_of_distributions_with_nothing_in_common(name, most):
    found = most_of(by_name(name))
    if name.startswith("generalized"):  # the entropy of a coin of weight 0.1
        most = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert found == (None if most is None else pytest.approx(most, rel=1e-5))
