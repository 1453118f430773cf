"""Targets are what their formulas say; fitted coefficients meet their moments, know their error,
and report the impossible."""

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
    with refused(r"\[4\] and \[3\]"):
        targets.pointwise(log_a, jnp.ones(3, bool))


def test_smoothed_is_finite_everywhere_and_violates_as_often_as_it_says(x64):
    log_a = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    satisfied, epsilon = jnp.array([True, False, False, False]), 0.01
    log_score = targets.smoothed(log_a, satisfied, epsilon=epsilon)
    log_p = log_score - enumeration.exact_log_z(log_score)
    assert np.isfinite(log_p).all()
    assert float(jnp.exp(log_p)[1:].sum()) == pytest.approx(
        epsilon * 0.9 / (0.1 + epsilon), rel=1e-12
    )
    assert np.isfinite(exact_divergence(log_a, log_p, divergence=reverse_kl()))
    with refused("epsilon must be positive, got 0"):
        targets.smoothed(log_a, satisfied, epsilon=0.0)


def test_reward_tilted_reaches_beta_log_z(x64):
    log_a, _ = space()
    rewards, beta = jnp.linspace(-1, 1, 12), 0.5
    log_score = targets.reward_tilted(log_a, rewards, beta=beta)
    log_z = enumeration.exact_log_z(log_score)
    log_p = log_score - log_z
    value = jnp.exp(log_p) @ rewards - beta * exact_divergence(
        log_p, log_a, divergence=reverse_kl()
    )
    assert float(value) == pytest.approx(beta * float(log_z), rel=1e-12)
    with refused("beta must be positive, got -1"):
        targets.reward_tilted(log_a, rewards, beta=-1.0)


def test_a_product_of_experts(x64):
    experts = jnp.array([[-1.0, -2.0, -jnp.inf], [-3.0, -jnp.inf, -1.0]])
    assert targets.product_of_experts(experts).tolist() == [-4, -np.inf, -np.inf]
    half_veto = targets.product_of_experts(experts, weights=jnp.array([0.5, 0.0]))
    assert half_veto.tolist() == [-0.5, -1, -np.inf]
    assert targets.product_of_experts(experts[..., None], weights=jnp.array([1.0, 1.0])).shape == (
        3,
        1,
    )


def test_a_hybrid_is_one_target_on_another(x64):
    """A hard constraint by an infinite coefficient, and by `pointwise`, are one."""
    log_a, features = space(1)
    hard = features[:, 0] == 1
    by_coefficient = targets.exponential_family(log_a, features, jnp.array([jnp.inf, 0.5, -0.2]))
    soft = targets.exponential_family(log_a, features[:, 1:], jnp.array([0.5, -0.2]))
    np.testing.assert_array_equal(by_coefficient, targets.pointwise(soft, hard))


def test_coefficients_cover_the_truth_as_their_errors_say(x64):
    """Over 400 samples of 2000, the truth lies within 1.96 standard errors 95 % of the time, ± 5 of
    its own errors."""
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
    with refused(r"features must be \[N, K\].*got \[4, 2\] and \[3\]"):
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


@pytest.mark.parametrize("dtype", [bool, "int32", "float32", "bfloat16"])
def test_a_constraint_may_be_given_as_numbers(dtype, bare):
    log_a, satisfied = jnp.array([-1.0, -2.0, -3.0]), jnp.array([True, False, True])
    assert targets.pointwise(log_a, satisfied.astype(dtype)).tolist() == [-1, -np.inf, -3]
    smooth = targets.smoothed(log_a, satisfied.astype(dtype), epsilon=0.5)
    np.testing.assert_allclose(smooth, log_a + np.log([1.5, 0.5, 1.5]), rtol=1e-6)
    if dtype == "int32":  # a count of hits is a mask, not a factor
        np.testing.assert_array_equal(
            targets.smoothed(log_a, jnp.array([3, 0, 2]), epsilon=0.5), smooth
        )


def test_lists_and_numpy_arrays_do(bare):
    assert targets.pointwise(np.array([-1.0, -2.0]), [1, 0]).tolist() == [-1, -np.inf]
    assert targets.reward_tilted(
        np.array([-1.0, -2.0]), np.array([True, False]), beta=0.5
    ).tolist() == [1, -2]
    assert targets.product_of_experts([[-1.0], [-2.0]], weights=[1, 0]).tolist() == [-1]
    fit = targets.fit_coefficients([[1], [0], [0], [0]], [0.5])
    assert float(fit.coefficients[0]) == pytest.approx(np.log(3), rel=1e-4)


def test_one_weight_an_expert_or_an_error():
    for weights in (jnp.ones((2, 1)), jnp.ones(3), jnp.ones(())):
        with refused("One weight an expert"):
            targets.product_of_experts(jnp.zeros((2, 3)), weights=weights)


def test_a_hybrid_has_the_normaliser_of_the_whole_space(x64):
    """log E_a[b exp(λ·φ)], hard and soft together, by enumeration."""
    log_a, features = space(4)
    moments = jnp.array([1.0, 0.6, 0.3])
    # weights need no scale
    fit = targets.fit_coefficients(features, moments, log_weights=log_a + 3.0)
    assert fit.converged
    log_score = targets.exponential_family(log_a, features, fit.coefficients)
    hard = np.asarray(features[:, 0] == 1)
    by_hand = (np.exp(log_a) * np.exp(features[:, 1:] @ fit.coefficients[1:]))[hard].sum()
    assert float(fit.log_z) == pytest.approx(np.log(by_hand), abs=1e-9)
    assert float(fit.log_z) == pytest.approx(float(enumeration.exact_log_z(log_score)), abs=1e-9)
    np.testing.assert_allclose(jax.nn.softmax(log_score) @ features, moments, atol=1e-9)
    # what is normalised within the hard part alone would differ
    assert np.exp(log_a)[hard].sum() < 0.9


def test_newton_converges_quadratically(x64):
    """Between features that hardly differ too: 5 steps from 0 to 1e-10, where a ridge of 1e-2 in
    place of 1e-9 takes 12."""
    log_a, features = space(2, size=40)
    twin = features[:, 0].at[jnp.argmax(features[:, 0])].set(0.0)
    features = jnp.concatenate([features, twin[:, None]], axis=1)
    truth = jnp.array([0.8, -0.5, 0.3, 1.0])
    moments = jax.nn.softmax(targets.exponential_family(log_a, features, truth)) @ features
    fit = targets.fit_coefficients(features, moments, log_weights=log_a)
    assert fit.converged
    assert int(fit.steps) <= 7
    np.testing.assert_allclose(fit.coefficients, truth, atol=1e-8)


def test_features_that_cannot_be_told_apart_are_said_to_be(x64):
    """Regression: two equal ones came back with errors of NaN. The distribution is known; which of
    them carries it, is not."""
    log_a, features = space(2, size=40, features=2)
    single = targets.fit_coefficients(features, jnp.array([0.6, 0.5]), log_weights=log_a)
    for third, moment, apart in (
        (features[:, 0], 0.6, [False, True, False]),  # equal
        (1 - features[:, 0], 0.4, [False, True, False]),  # complementary
        (features[:, 0] + 2 * features[:, 1], 1.6, [False, False, False]),  # a sum
    ):
        both = jnp.concatenate([features, third[:, None]], axis=1)
        fit = targets.fit_coefficients(both, jnp.array([0.6, 0.5, moment]), log_weights=log_a)
        assert fit.converged
        assert np.isfinite(fit.coefficients).all()
        assert np.isfinite(fit.std_error).tolist() == apart
        assert np.isposinf(fit.std_error).tolist() == [not x for x in apart]
        np.testing.assert_allclose(
            fit.std_error[np.array(apart)], single.std_error[np.array(apart)[:2]], rtol=1e-6
        )
        weights = [
            jax.nn.softmax(targets.exponential_family(log_a, x, f.coefficients))
            for x, f in ((features, single), (both, fit))
        ]
        np.testing.assert_allclose(*weights, atol=1e-9)


def test_equal_features_in_float32():
    rng = np.random.default_rng(0)
    feature = jnp.asarray(rng.uniform(size=5000) < 0.3, jnp.float32)
    fit = targets.fit_coefficients(jnp.stack([feature, feature], axis=1), jnp.array([0.5, 0.5]))
    assert fit.converged
    assert np.isposinf(fit.std_error).all()
    rate = float(feature.mean())
    assert float(fit.coefficients.sum()) == pytest.approx(-np.log(rate / (1 - rate)), rel=1e-3)


def test_what_cannot_fire_under_the_hard_constraint_is_unreachable():
    """Regression: λ of the second ended at -8.4e7."""
    features = jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    fit = targets.fit_coefficients(features, jnp.array([1.0, 0.3, 0.75]))
    assert fit.unreachable.tolist() == [False, True, False]
    assert not fit.converged
    assert float(fit.coefficients[1]) == 0
    assert float(fit.residual[1]) == pytest.approx(-0.3)
    # and the others are fitted
    assert float(fit.coefficients[2]) == pytest.approx(np.log(3), rel=1e-4)
    assert np.isnan(fit.std_error).tolist() == [True, True, False]


def test_a_constant_feature_has_its_moment_by_itself():
    features = jnp.array([[2.5, 1.0], [2.5, 0.0]])
    fit = targets.fit_coefficients(features, jnp.array([2.5, 0.75]))
    assert fit.converged
    assert not fit.unreachable.any()
    assert float(fit.coefficients[0]) == 0
    assert np.isposinf(fit.std_error[0])  # any λ would do


def test_samples_without_weight_may_have_any_features():
    features, log_weights = jnp.array([[1.0], [0.0], [0.0], [0.0]]), jnp.zeros(4)
    fit = targets.fit_coefficients(features, jnp.array([0.5]), log_weights=log_weights)
    for junk in (np.nan, np.inf, -7.0):
        padded = targets.fit_coefficients(
            jnp.append(features, jnp.full((1, 1), junk), axis=0),
            jnp.array([0.5]),
            log_weights=jnp.append(log_weights, -np.inf),
        )
        jax.tree.map(np.testing.assert_array_equal, padded, fit)


def test_float32_arrays_in_64_bit_mode(x64):
    """Regression: JAX_ENABLE_X64=1 with float32 features was an error of the while loop, float32[1]
    and float64[1]."""
    features = jnp.array([[1, 0], [0, 1], [0, 0], [1, 1], [0, 0]], jnp.float32)
    fit = targets.fit_coefficients(features, jnp.array([0.6, 0.5], jnp.float32))
    with jax.enable_x64(False):
        expected = targets.fit_coefficients(
            jnp.asarray(features), jnp.array([0.6, 0.5], jnp.float32)
        )
    for got, wanted in zip(fit, expected, strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_samples_may_be_spread_over_an_explicit_mesh():
    """Regression: ShardingTypeError, for a sum over rows that are spread does not say where its
    result belongs."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    rng = np.random.default_rng(0)
    features, log_weights = (
        jnp.asarray(rng.uniform(size=(64, 2)) < 0.4, jnp.float32),
        jnp.asarray(rng.normal(size=64), jnp.float32),
    )
    moments = jnp.array([0.5, 0.5])
    expected = targets.fit_coefficients(features, moments, log_weights=log_weights)
    with jax.set_mesh(mesh):
        spread = [
            jax.device_put(x, jax.NamedSharding(mesh, jax.P("rows")))
            for x in (features, log_weights)
        ]
        for fit in (targets.fit_coefficients, jax.jit(targets.fit_coefficients)):
            found = fit(spread[0], moments, log_weights=spread[1])
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
            )


def test_every_product_says_which_precision_it_needs():
    """Accelerators would multiply float32 as bfloat16 or TF32, and the moments be met to three
    digits."""
    log_a, features = jnp.zeros(4), jnp.zeros((4, 2))

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for parameter in jax.tree.leaves(
                equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")
            ):
                if hasattr(parameter, "jaxpr"):
                    yield from products(parameter.jaxpr)

    for function in (targets.exponential_family, lambda _, x, m: targets.fit_coefficients(x, m)):
        found = list(products(jax.make_jaxpr(function)(log_a, features, jnp.zeros(2)).jaxpr))
        assert found
        assert set(found) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
