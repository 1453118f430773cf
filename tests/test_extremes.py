"""Weights, terms and divergences against decimals of fifty digits, for log_t from -10^4 to 10^4 and
at both infinities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import estimators, surrogates
from fjax.divergences import (
    alpha_divergence,
    exact_divergence,
    forward_kl,
    from_generator,
    reverse_kl,
)
from tests.cases import each
from tests.decimals import exactly

LOG_T = [
    0.0,
    *(sign * x for x in (1.0, 28, 60, 87, 89, 100, 150, 700, 720, 3000, 1e4) for sign in (1, -1)),
]
PRECISIONS = ["float32", "float64"]


def points(dtype) -> np.ndarray:
    """(log π, log p, log q): every log_t with ratios π/q of either sign, and the two without
    mass."""
    rows = [
        (s - 5, -5.0, s - 5 - r)
        for s in LOG_T
        for r in (0.0, -3.0, 50.0, -90.0, s / 2, s, -s / 2, -s, 2 * s, s + 30)
    ]
    rows += [
        row
        for log_q in (-5.0, -100.0, 0.0)
        for row in ((-np.inf, -5.0, log_q), (-5.0, -np.inf, log_q))
    ]
    return np.array(rows).astype(dtype)


def agree(actual, expected, log_probs, absolute=0.0, edge=1):
    """Infinite only where the formula is beyond the floats, or their edge; else within the rounding
    of the exponents."""
    actual = np.asarray(actual)
    limits = np.finfo(actual.dtype)
    size = 1 + np.abs(np.where(np.isfinite(log_probs), log_probs, 0.0)).astype(float).sum(axis=1)
    tolerance = 2 * limits.eps * size
    with np.errstate(all="ignore"):
        beyond = np.abs(expected) > float(limits.max) / edge * (1 - np.minimum(tolerance, 0.5))
        error = np.abs(actual.astype(float) - expected) - absolute
    infinite = np.isinf(actual) & (np.sign(actual) == np.sign(expected))
    small = np.abs(expected) < float(limits.tiny) * 10
    good = np.where(
        infinite,
        beyond,
        (error <= tolerance * np.abs(expected)) | small & (np.abs(actual) < limits.tiny * 20),
    )
    assert good.all(), [(*log_probs[i], actual[i], expected[i]) for i in np.flatnonzero(~good)[:5]]


@pytest.fixture(params=PRECISIONS)
def precision(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@each
def test_weights_are_infinite_only_where_the_formula_is(case, precision):
    log_probs = points(precision)
    slope, weight, _ = np.array([exactly(case, *map(float, row)) for row in log_probs]).T
    log_pi, log_p, log_q = (jnp.asarray(x) for x in log_probs.T)
    # Near t = 1 f' is exact up to its own scale only, which the ratio multiplies.
    with np.errstate(over="ignore"):
        rounding = np.finfo(precision).eps * np.exp(
            np.minimum(log_probs[:, 0].astype(float) - log_probs[:, 2], 700)
        )
    rounding = np.where(np.abs(log_probs[:, 0] - log_probs[:, 1]) < 2, rounding, 0.0)
    weights = jax.jit(lambda *x: surrogates.score_weights(*x, divergence=case.divergence))
    agree(weights(log_pi, log_p, log_q), weight, log_probs, rounding)
    agree(weights(log_pi, log_p), slope, log_probs, 2 * np.finfo(precision).eps)
    rewards = surrogates.pseudo_rewards(log_pi, log_p, divergence=case.divergence)
    agree(-rewards, slope, log_probs, 2 * np.finfo(precision).eps)


@each
def test_so_are_the_terms_of_the_estimate(case, precision):
    log_probs = points(precision)
    term = np.array([exactly(case, *map(float, row))[2] for row in log_probs])

    @jax.jit
    @jax.vmap
    def values(row):
        return estimators.estimate_divergence(
            *(x[None] for x in row), divergence=case.divergence
        ).value

    agree(values(jnp.asarray(log_probs)), term, log_probs)


@each
def test_so_are_the_exact_divergence_and_its_gradient(case, precision):
    """p f(t) and π f'(t) of one member of a space."""
    log_t = np.array([*LOG_T, -np.inf, np.inf], precision)
    log_probs = np.concatenate(
        [np.stack([np.minimum(log_t, 0), np.minimum(-log_t, 0), 0 * np.sign(log_t)], axis=1)] * 2
    )
    log_probs[: len(log_t), :2] -= 30.0
    _, weight, term = np.array([exactly(case, *map(float, row)) for row in log_probs]).T

    @jax.jit
    @jax.vmap
    def both(log_pi, log_p):
        return jax.value_and_grad(
            lambda x: exact_divergence(x[None], log_p[None], divergence=case.divergence)
        )(log_pi)

    value, gradient = both(*jnp.asarray(log_probs[:, :2]).T)
    # p f(t) with p ≤ 1: what underflows is nothing to the sum
    agree(value, term, log_probs, 1e3 * np.finfo(precision).tiny)
    finite = np.isfinite(log_probs).all(axis=1)
    # products of autodiff
    agree(gradient[finite], weight[finite], log_probs[finite], 2 * np.finfo(precision).eps, edge=8)
    assert not np.isnan(gradient).any()


@pytest.mark.parametrize(
    ("alpha", "log_t", "log_ratio", "weight"),
    [
        (0.1, -100.0, -100.0, -5.0444e-05),
        (0.1, -150.0, -150.0, -3.3989e-07),
        (-0.5, -100.0, -100.0, -3.4564e21),
    ],
)
def test_the_weights_that_were_seen_to_be_wrong(alpha, log_t, log_ratio, weight):
    """Regression: t f'(t) was read off at log_t = -80, wherever f' had overflowed."""
    log_p, log_pi = jnp.zeros(1), jnp.full(1, log_t)
    weights = surrogates.score_weights(
        log_pi, log_p, log_pi - log_ratio, divergence=alpha_divergence(alpha)
    )
    np.testing.assert_allclose(weights, weight, rtol=2e-4)


def test_forward_kl_in_float16():
    """Regression: -inf, where the truth is -p/q = -1."""
    log_pi, log_p = jnp.full(1, -28, jnp.float16), jnp.zeros(1, jnp.float16)
    assert surrogates.score_weights(log_pi, log_p, log_p, divergence=forward_kl()).tolist() == [-1]


def test_a_clip_holds_where_factors_over_and_underflow():
    log_pi, log_p, log_q = jnp.array(
        [[0.0, -300.0, 0.0], [-200.0, 0.0, -jnp.inf], [-200.0, -300.0, 0.0]]
    )
    weights = surrogates.score_weights(
        log_pi, log_p, log_q, divergence=forward_kl(), clip=(-10.0, 10.0)
    )
    np.testing.assert_allclose(weights, [-1, -10, 0], rtol=1e-4)
    free = surrogates.score_weights(
        log_pi, log_p, log_q, divergence=forward_kl(), clip=(-jnp.inf, jnp.inf)
    )
    np.testing.assert_allclose(free, [-1, -jnp.inf, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("f", "named"),
    [(lambda t: -jnp.log(t), forward_kl()), (lambda t: t * jnp.log(t), reverse_kl())],
)
def test_a_divergence_from_a_plain_function_has_the_same_weight_at_no_mass(f, named):
    log_pi, log_p, log_q = jnp.array([[-jnp.inf, -60.0], [-1.0, -1.0], [-2.0, -2.0]])
    mine = surrogates.score_weights(log_pi, log_p, log_q, divergence=from_generator(f))
    np.testing.assert_allclose(
        mine,
        surrogates.score_weights(log_pi, log_p, log_q, divergence=named),
        rtol=1e-4,
        atol=1e-20,
    )
