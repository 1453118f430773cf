"""One λ for the moments over several contexts: exact in listed spaces, with errors that hold, and
what is impossible reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import fit_coefficients
from fjax import moments as of_fjax
from fjax.targets import exponential_family
from tests.cases import refused

C, N, K = 4, 30, 3


def fit_coefficients_over_contexts(features, moments, log_weights=None, **options):
    logs = None if log_weights is None else jnp.asarray(log_weights)
    return of_fjax.fit_coefficients_over_contexts(
        jnp.asarray(features), jnp.asarray(moments), log_weights=logs, **options
    )


def spaces(seed=0):
    """Of each context all members: log a, and two Boolean features around one that is any number."""
    rng = np.random.default_rng(seed)
    log_a = np.log(rng.dirichlet(np.ones(N), size=C))
    features = (rng.uniform(size=(C, N, K)) < 0.4).astype(float)
    features[..., 1] = rng.normal(size=(C, N))
    return log_a, features


def by_definition(log_a, features, coefficients):
    """Of each context E_p[φ], log Z and KL(p‖a), summed over its members."""
    found = []
    for log_a_c, x in zip(log_a, features, strict=True):
        log_score = np.asarray(exponential_family(*map(jnp.asarray, (log_a_c, x, coefficients))))
        z = np.exp(log_score).sum()
        p = np.exp(log_score) / z
        some = p > 0
        found.append((p @ x, np.log(z), p[some] @ (np.log(p[some]) - log_a_c[some])))
    return [np.mean(part, axis=0) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("moments", [(0.6, 0.3, 0.2), (1.0, 0.3, 0.2), (0.0, -0.1, 0.7)])
def test_the_moments_are_met_on_average_over_contexts_each_with_its_own_z(moments, x64):
    log_a, features = spaces()
    fit = jax.jit(fit_coefficients_over_contexts)(features, np.array(moments), log_weights=log_a)
    means, log_z, kl = by_definition(log_a, features, fit.coefficients)
    assert fit.converged
    np.testing.assert_allclose(means, moments, atol=1e-9)
    np.testing.assert_allclose(fit.residual, 0, atol=1e-9)
    assert float(fit.log_z) == pytest.approx(log_z, abs=1e-12)
    soft = np.where(np.isfinite(fit.coefficients), fit.coefficients, 0)
    assert kl == pytest.approx(soft @ moments - log_z, abs=1e-9)


def test_it_is_the_family_nearest_to_the_base(x64):
    """Of others with the same means, here with one λ more in the first context and less in the
    second, every one is further off."""
    log_a, features = spaces(1)
    features = features[..., :1]
    fit = fit_coefficients_over_contexts(features, np.array([0.6]), log_weights=log_a)
    *_, nearest = by_definition(log_a, features, fit.coefficients)
    for moment in (-0.1, 0.05, 0.1):
        others = [
            fit_coefficients(*map(jnp.asarray, (x, [m])), log_weights=jnp.asarray(w)).coefficients
            for w, x, m in zip(log_a, features, _shifted(log_a, features, fit, moment), strict=True)
        ]
        parts = [by_definition(log_a[i : i + 1], features[i : i + 1], others[i]) for i in range(C)]
        assert np.mean([mean[0] for mean, *_ in parts]) == pytest.approx(0.6, abs=1e-9)
        assert np.mean([kl for *_, kl in parts]) > nearest + 1e-4


def _shifted(log_a, features, fit, by):
    means = [
        float(by_definition(log_a[i : i + 1], features[i : i + 1], fit.coefficients)[0][0])
        for i in range(C)
    ]
    return [means[0] + by, means[1] - by, *means[2:]]


def test_of_one_context_it_is_the_fit_of_its_samples(x64):
    log_a, features = spaces(2)
    moments = np.array([1.0, 0.2, 0.3])
    of_one = fit_coefficients(
        *map(jnp.asarray, (features[0], moments)), log_weights=jnp.asarray(log_a[0])
    )
    found = fit_coefficients_over_contexts(features[:1], moments, log_weights=log_a[:1])
    for a, b in zip(found, of_one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_errors_are_those_of_the_samples_in_the_contexts(x64):
    """Over 400 draws of 4 × 500, the spread of λ is what its errors say, within 5 of its own errors
    √(2/400) of the variance; and the truth lies where it should."""
    log_a, features = spaces(3)
    truth = np.array([0.8, -0.5, 0.3])
    moments, *_ = by_definition(log_a, features, truth)
    draws = jax.random.categorical(jax.random.key(0), jnp.asarray(log_a), shape=(400, 500, C))
    drawn = jnp.stack([jnp.asarray(features)[c][draws[..., c]] for c in range(C)], axis=1)
    fits = jax.jit(jax.vmap(lambda x: fit_coefficients_over_contexts(x, moments)))(drawn)
    assert fits.converged.all()
    ratio = fits.coefficients.var(axis=0) / (fits.std_error**2).mean(axis=0)
    np.testing.assert_allclose(ratio, 1, atol=5 * np.sqrt(2 / 400))
    off = (fits.coefficients.mean(axis=0) - truth) / (fits.std_error.mean(axis=0) / np.sqrt(400))
    assert (np.abs(off) < 5).all()


def test_a_context_that_cannot_satisfy_the_constraint_is_left_out(x64):
    """And one without any weight."""
    log_a, features = spaces(4)
    features[1, :, 0], log_a[2] = 0, -np.inf
    features[2] = np.nan
    moments = np.array([1.0, 0.2, 0.3])
    fit = fit_coefficients_over_contexts(features, moments, log_weights=log_a)
    kept = fit_coefficients_over_contexts(features[[0, 3]], moments, log_weights=log_a[[0, 3]])
    assert fit.converged
    for a, b in zip(fit, kept, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_what_is_out_of_reach_on_average_is_said(x64):
    """A feature that is always 0 in one context of two has a mean of at most a half."""
    features = np.array([[[1.0], [0.0], [1.0]], [[0.0], [0.0], [0.0]]])
    for moment, reachable in ((0.49, True), (0.5, False), (0.7, False)):
        fit = fit_coefficients_over_contexts(features, np.array([moment]))
        assert (bool(fit.converged), bool(fit.unreachable[0])) == (reachable, not reachable)
    nowhere = fit_coefficients_over_contexts(np.zeros((2, 3, 1)), np.array([1.0]))
    assert not nowhere.converged
    assert np.isfinite(nowhere.residual).all()


def test_in_float32():
    rng = np.random.default_rng(0)
    features = np.float32(rng.uniform(size=(8, 200, 1)) < rng.uniform(size=(8, 1, 1)))
    fit = fit_coefficients_over_contexts(features, np.float32([0.5]))
    assert fit.coefficients.dtype == jnp.float32
    assert fit.converged
    assert abs(float(fit.residual[0])) < 1e-5


def test_wrong_shapes_are_refused():
    features, moments = np.zeros((2, 3, 1)), np.zeros(1)
    for given, logs in (
        ((features[0], moments), None),
        ((features, np.zeros(2)), None),
        ((features, moments), np.zeros((3, 2))),
    ):
        with refused(r"features must be \[C, N, K\], N samples of each context"):
            fit_coefficients_over_contexts(*given, log_weights=logs)
    with refused("tolerance must be positive"):
        fit_coefficients_over_contexts(features, moments, tolerance=0.0)
