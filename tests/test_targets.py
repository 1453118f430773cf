"""Targets are what their formulas say; fitted coefficients meet their moments, know their error, and report the impossible."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import enumeration, targets
from fjax.divergences import exact_divergence, reverse_kl
from tests.cases import refused


def space(seed=0, size=12, features=3):
    rng = np.random.default_rng(seed)
    log_a = jnp.log(jnp.asarray(rng.dirichlet(np.ones(size))))
    return log_a, jnp.asarray((rng.uniform(size=(size, features)) < 0.4).astype(float))


def test_pointwise_keeps_the_base_where_satisfied(x64):
    log_a = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    log_score = targets.pointwise(log_a, jnp.array([True, False, True, False]))
    assert float(jnp.exp(enumeration.exact_log_z(log_score))) == pytest.approx(0.4)
    with refused(r"\(4,\), \(3,\)"):
        targets.pointwise(log_a, jnp.ones(3, bool))


def test_smoothed_is_finite_everywhere_and_violates_as_often_as_it_says(x64):
    log_a = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    satisfied, epsilon = jnp.array([True, False, False, False]), 0.01
    log_score = targets.smoothed(log_a, satisfied, epsilon=epsilon)
    log_p = log_score - enumeration.exact_log_z(log_score)
    assert np.isfinite(log_p).all()
    assert float(jnp.exp(log_p)[1:].sum()) == pytest.approx(epsilon * 0.9 / (0.1 + epsilon), rel=1e-12)
    assert np.isfinite(exact_divergence(log_a, log_p, divergence=reverse_kl()))
    with refused("epsilon must be positive, got 0"):
        targets.smoothed(log_a, satisfied, epsilon=0.0)


def test_reward_tilted_reaches_beta_log_z(x64):
    log_a, _ = space()
    rewards, beta = jnp.linspace(-1, 1, 12), 0.5
    log_score = targets.reward_tilted(log_a, rewards, beta=beta)
    log_z = enumeration.exact_log_z(log_score)
    log_p = log_score - log_z
    value = jnp.exp(log_p) @ rewards - beta * exact_divergence(log_p, log_a, divergence=reverse_kl())
    assert float(value) == pytest.approx(beta * float(log_z), rel=1e-12)
    with refused("beta must be positive, got -1"):
        targets.reward_tilted(log_a, rewards, beta=-1.0)


def test_a_product_of_experts(x64):
    experts = jnp.array([[-1.0, -2.0, -jnp.inf], [-3.0, -jnp.inf, -1.0]])
    assert targets.product_of_experts(experts).tolist() == [-4, -np.inf, -np.inf]
    half_veto = targets.product_of_experts(experts, weights=jnp.array([0.5, 0.0]))
    assert half_veto.tolist() == [-0.5, -1, -np.inf]
    assert targets.product_of_experts(experts[..., None], weights=jnp.array([1.0, 1.0])).shape == (3, 1)


def test_a_hybrid_is_one_target_on_another(x64):
    """A hard constraint by an infinite coefficient, and by `pointwise`, are one."""
    log_a, features = space(1)
    hard = features[:, 0] == 1
    by_coefficient = targets.exponential_family(log_a, features, jnp.array([jnp.inf, 0.5, -0.2]))
    soft = targets.exponential_family(log_a, features[:, 1:], jnp.array([0.5, -0.2]))
    np.testing.assert_array_equal(by_coefficient, targets.pointwise(soft, hard))


def test_coefficients_cover_the_truth_as_their_errors_say(x64):
    """Over 400 samples of 2000, the truth lies within 1.96 standard errors 95 % of the time, ± 5 of its own errors."""
    log_a, features = space(2, features=2)
    moments = jnp.array([0.6, 0.5])
    truth = targets.fit_coefficients(features, moments, log_weights=log_a)
    assert truth.converged
    rows = jax.random.categorical(jax.random.key(0), log_a, shape=(400, 2000))
    fits = jax.jit(jax.vmap(lambda rows: targets.fit_coefficients(features[rows], moments)))(rows)
    assert fits.converged.all()
    covered = abs(fits.coefficients - truth.coefficients[None]) < 1.96 * fits.std_error
    spread = np.sqrt(0.95 * 0.05 / 400)
    assert (abs(covered.mean(axis=0) - 0.95) < 5 * spread).all(), covered.mean(axis=0)


def test_samples_of_another_distribution_serve_with_their_weights(x64):
    log_a, features = space(3, features=2)
    log_q = jax.nn.log_softmax(0.5 * log_a)
    moments = jnp.array([0.5, 0.5])
    truth = targets.fit_coefficients(features, moments, log_weights=log_a)
    rows = jax.random.categorical(jax.random.key(0), log_q, shape=(50_000,))
    fit = targets.fit_coefficients(features[rows], moments, log_weights=(log_a - log_q)[rows])
    assert (abs(fit.coefficients - truth.coefficients) < 5 * fit.std_error).all()


def test_a_feature_that_never_fires_is_reported_and_the_others_fitted():
    features = jnp.stack([jnp.arange(8) % 2, jnp.zeros(8)], axis=1).astype(jnp.float32)
    fit = jax.jit(targets.fit_coefficients)(features, jnp.array([0.75, 0.3]))
    assert fit.unreachable.tolist() == [False, True]
    assert not fit.converged
    assert float(fit.coefficients[0]) == pytest.approx(np.log(3), rel=1e-4)
    assert float(fit.coefficients[1]) == 0
    assert float(fit.residual[1]) == pytest.approx(-0.3)


def test_moments_outside_the_convex_hull_are_reported_and_nothing_diverges():
    features = jnp.array([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # always equal, asked to differ
    fit = targets.fit_coefficients(features, jnp.array([0.2, 0.7]))
    assert not fit.converged
    assert not fit.unreachable.any()
    assert np.isfinite(fit.coefficients).all()
    assert np.isfinite(fit.residual).all()
    assert abs(fit.residual).max() > 0.1


def test_contradicting_hard_constraints_are_reported():
    features = jnp.array([[1.0, 0.0], [0.0, 1.0]])  # never together
    fit = targets.fit_coefficients(features, jnp.array([1.0, 1.0]))
    assert not fit.converged
    never = targets.fit_coefficients(jnp.zeros((4, 1)), jnp.array([1.0]))
    assert not never.converged
    assert never.unreachable.tolist() == [True]


def test_a_number_of_moments_that_is_not_that_of_the_features_is_refused():
    with refused("2 features and 3 moments"):
        targets.fit_coefficients(jnp.zeros((4, 2)), jnp.zeros(3))


def test_a_hundred_thousand_samples_of_sixteen_features_take_less_than_a_second():
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.6, 16)
    features = jnp.asarray((rng.uniform(size=(100_000, 16)) < rates), jnp.float32)
    moments = jnp.asarray(np.clip(rates * 1.5, 0, 0.9), jnp.float32)
    fit = jax.jit(targets.fit_coefficients)
    jax.block_until_ready(fit(features, moments))  # compiles
    begun = time.perf_counter()
    result = jax.block_until_ready(fit(features, moments))
    assert time.perf_counter() - begun < 1
    assert result.converged
