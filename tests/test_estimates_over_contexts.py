"""What is reported of an evaluation: means, ratios and win rates over contexts, exactly and within
their errors."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax.estimators import (
    Estimate,
    estimate_mean,
    estimate_mean_over_contexts,
    estimate_ratio,
    estimate_win_rate,
    over_contexts,
)
from tests.cases import refused

RUNS = 400


def spread_is_stated(found: list[Estimate], truth: float) -> None:
    """400 repetitions know a standard deviation to 3.5 %; the mean is within 4 standard errors."""
    values, errors = np.array([(estimate.value, estimate.std_error) for estimate in found]).T
    assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(len(found))
    assert 0.88 < errors.mean() / values.std(ddof=1) < 1.12


def test_one_context_is_a_plain_mean():
    values = np.random.default_rng(0).normal(size=50)
    found = estimate_mean_over_contexts(values)
    with jax.enable_x64(True):
        np.testing.assert_allclose(found, estimate_mean(jnp.asarray(values)), rtol=1e-13)
    assert estimate_mean_over_contexts(values[None]) == found
    assert all(isinstance(x, float) for x in found)


def test_several_contexts_are_a_mean_of_means():
    values = np.array([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])
    means = np.array([2.0, 6.0, 1.0])
    error = means.std(ddof=1) / math.sqrt(3)
    assert estimate_mean_over_contexts(values) == pytest.approx((3.0, error, 6.0), rel=1e-15)


def test_a_ratio_of_means_has_the_error_of_the_delta_method():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RUNS):
        bottom = (rng.uniform(size=200) < 0.4).astype(float)
        found.append(estimate_ratio(bottom * (rng.uniform(size=200) < 0.3), bottom))
    spread_is_stated(found, 0.3)


def test_a_ratio_of_one_number_has_no_error():
    """u = R v in every sample: nothing is left of the spread, whatever that of v is."""
    bottom = np.random.default_rng(0).uniform(size=(3, 8))
    assert estimate_ratio(2.5 * bottom, bottom) == pytest.approx((2.5, 0.0, 24.0), abs=1e-15)
    of_contexts = estimate_ratio(bottom**2, bottom)
    assert of_contexts.value == pytest.approx((bottom**2).sum() / bottom.sum(), rel=1e-14)
    assert np.isnan(estimate_ratio(np.zeros(3), np.zeros(3))).all()


def test_a_win_rate_is_of_all_pairs_and_a_tie_counts_half():
    rng = np.random.default_rng(0)
    mine, other = rng.integers(0, 4, size=(2, 3, 7))
    by_hand = [
        np.mean([(x > y) + 0.5 * (x == y) for x, y in itertools.product(*rows)])
        for rows in zip(mine, other, strict=True)
    ]
    several = estimate_win_rate(mine, other)
    assert several.value == pytest.approx(np.mean(by_hand), rel=1e-14)
    assert several.std_error == pytest.approx(np.std(by_hand, ddof=1) / math.sqrt(3), rel=1e-14)
    assert several.ess == 3 * 7 * 7
    one = estimate_win_rate(mine[0], other[0])
    assert (one.value, one.ess) == (pytest.approx(by_hand[0], rel=1e-14), 7.0)
    assert estimate_win_rate(mine[0], mine[0]).value == 0.5


def test_the_error_of_a_win_rate_is_that_of_a_u_statistic():
    """Rewards 0 to 3 of different frequencies on the two sides, and of different sizes."""
    rng = np.random.default_rng(0)
    p, a = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    truth = sum(p[i] * a[j] * ((i > j) + 0.5 * (i == j)) for i in range(4) for j in range(4))
    found = [
        estimate_win_rate(rng.choice(4, size=60, p=p), rng.choice(4, size=40, p=a))
        for _ in range(RUNS)
    ]
    spread_is_stated(found, truth)


def test_estimates_of_contexts_are_averaged_where_they_are_known():
    unknown = [np.nan, -np.inf]
    values = np.array([1.0, *unknown, 4.0, 4.0])
    found = over_contexts(Estimate(values, np.full(5, 9.0), np.arange(5.0)))
    assert found == pytest.approx((3.0, 1.0, 10.0), rel=1e-15)
    nothing = over_contexts(Estimate(np.array(unknown), np.ones(2), np.ones(2)))
    assert nothing == pytest.approx((np.nan, np.inf, 0.0), nan_ok=True)
    unbounded = Estimate(np.array([1.0, np.inf]), np.ones(2), np.ones(2))
    assert over_contexts(unbounded) == (np.inf, np.inf, 2.0)
    single = Estimate(np.array([-np.inf]), np.array([np.inf]), np.array([0.0]))
    assert over_contexts(single) == (-np.inf, np.inf, 0.0)


def test_what_jax_has_computed_is_taken():
    values = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], np.float32)
    for call in (estimate_mean_over_contexts, lambda x: estimate_ratio(x, 1 + x)):
        assert call(values) == call(jnp.asarray(values))
    each = jax.vmap(estimate_mean)(jnp.asarray(values))
    assert over_contexts(each).value == pytest.approx(2 / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "because"),
    [
        (lambda: estimate_mean_over_contexts(np.zeros((2, 3, 4))), r"\[C, n\].*got \[2, 3, 4\]"),
        (lambda: estimate_mean_over_contexts(np.zeros((2, 0))), r"not empty; got \[2, 0\]"),
        (lambda: estimate_mean_over_contexts(np.zeros(())), r"got \[\]"),
        (lambda: estimate_ratio(np.zeros((1, 3)), np.zeros(4)), r"got \[1, 3\] and \[1, 4\]"),
        (lambda: estimate_win_rate(np.zeros((2, 3)), np.zeros((3, 3))), "contexts; got 2 and 3"),
        (
            lambda: over_contexts(Estimate(np.zeros(2), np.zeros(3), np.zeros(2))),
            r"got \[2\], \[3\] and \[2\]",
        ),
        (
            lambda: over_contexts(Estimate(np.array(0.0), np.array(0.0), np.array(0.0))),
            r"of shape \[C\]",
        ),
        (
            lambda: jax.jit(estimate_mean_over_contexts)(jnp.zeros(2)),
            "values is traced, but this is computed on the host: call it outside jit",
        ),
    ],
)
def test_misuse_is_refused(call, because):
    with refused(because):
        call()
