"""Every f against its textbook formula, at the ends of float32, and the sums that define D_f."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences
from fjax.divergences import forward_kl, jensen_shannon, reverse_kl, total_variation
from tests.cases import CASES, each, name, refused

# Compiled as a whole: the many small programs of a sum that is not take ten times as long.
exact_divergence = jax.jit(divergences.exact_divergence, static_argnames="divergence")
LOG_2 = np.log(2)
FIELDS = ("generator", "derivative", "integrand", "intercept")
EXTREMES = [0.0, 1e-8, 1e-4, 1.0, 20.0, 49.0, 51.0, 88.0, 89.0, 200.0, 1e4, np.inf]
EXTREMES = np.array([-x for x in reversed(EXTREMES)] + EXTREMES[1:], np.float32)
LOG_T = np.concatenate([np.linspace(-3, 3, 41), [-1e-3, 1e-3, -1.0, 1.0]])


def test_the_names_are_unique():
    assert len({name(case) for case in CASES}) == len(CASES)


@each
def test_generator_and_integrand_are_the_textbook_formula(case, x64):
    # the textbook loses its digits near t = 1, where there is none to lose
    t = np.exp(LOG_T.astype(np.longdouble))
    f, log_t = case.f(t), jnp.asarray(LOG_T)
    np.testing.assert_allclose(
        case.divergence.generator(log_t), f.astype(float), rtol=1e-12, atol=1e-15
    )
    np.testing.assert_allclose(
        case.divergence.integrand(log_t), (f / t).astype(float), rtol=1e-12, atol=1e-15
    )


@each
def test_derivative_is_the_slope_of_the_generator(case, x64):
    """df/ds = t f'(t) at s = log t, by autodiff; and f(t)/t changes by f'(t) - f(t)/t."""
    log_t = jnp.asarray(LOG_T)
    slope = case.divergence.derivative(log_t)
    by_generator = jax.vmap(jax.grad(case.divergence.generator))(log_t)
    by_integrand = jax.vmap(jax.grad(case.divergence.integrand))(log_t)
    intercept = case.divergence.intercept(log_t)
    np.testing.assert_allclose(
        intercept, case.divergence.generator(log_t) - np.exp(LOG_T) * slope, rtol=1e-9, atol=1e-14
    )
    np.testing.assert_allclose(by_generator, np.exp(LOG_T) * slope, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        by_integrand, slope - case.divergence.integrand(log_t), rtol=1e-12, atol=1e-14
    )


@each
def test_derivative_is_the_slope_of_the_textbook_formula(case, x64):
    """By differences of fourth order in extended precision: nothing of fjax but f' itself is in
    it."""
    t, h = np.exp(LOG_T[abs(LOG_T) > 0.01].astype(np.longdouble)), np.longdouble(1e-4)
    slope = (
        8 * (case.f(t + h * t) - case.f(t - h * t)) - case.f(t + 2 * h * t) + case.f(t - 2 * h * t)
    ) / (12 * h * t)
    coded = case.divergence.derivative(jnp.asarray(LOG_T[abs(LOG_T) > 0.01]))
    np.testing.assert_allclose(coded, slope.astype(float), rtol=1e-11, atol=1e-12)


@each
def test_convex_and_zero_at_one(case, x64):
    divergence, log_t = case.divergence, jnp.sort(jnp.asarray(LOG_T))
    zero = jnp.asarray(0.0)
    assert float(divergence.generator(zero)) == 0
    assert float(divergence.integrand(zero)) == 0
    assert (np.diff(divergence.derivative(log_t)) >= 0).all()
    above_tangent = divergence.generator(log_t) - divergence.derivative(zero) * jnp.expm1(log_t)
    assert (above_tangent >= -1e-15).all()


@each
def test_limits_and_curvature(case, x64):
    divergence = case.divergence
    assert float(divergence.value_at_zero) == pytest.approx(case.at_zero, rel=1e-14)
    assert float(divergence.slope_at_infinity) == pytest.approx(case.slope_at_infinity, rel=1e-14)
    assert float(divergence.integrand(jnp.asarray(jnp.inf))) == pytest.approx(
        case.slope_at_infinity, rel=1e-14
    )
    if case.curvature is not None:  # f''(1) is the slope of f' in log t as well, t being 1
        assert float(divergence.curvature) == pytest.approx(case.curvature, rel=1e-14)


@each
def test_float32_has_no_nan_in_values_or_gradients(case):
    log_t = jnp.asarray(EXTREMES)
    for field in FIELDS:
        function = getattr(case.divergence, field)
        value, gradient = function(log_t), jax.vmap(jax.grad(function))(log_t)
        assert value.dtype == gradient.dtype == jnp.float32
        assert not np.isnan(value).any(), field
        assert not np.isnan(gradient).any(), field


@each
@pytest.mark.parametrize("field", FIELDS)
def test_float32_is_as_good_as_float64(case, field):
    """In relative error, near t = 1 too; but f', a weight, and its dual's only in absolute error
    there."""
    log_t = jnp.asarray(EXTREMES[np.isfinite(EXTREMES)])
    value = np.asarray(getattr(case.divergence, field)(log_t), np.float64)
    with jax.enable_x64(True):
        reference = np.asarray(
            getattr(case.divergence, field)(jnp.asarray(np.asarray(log_t, np.float64)))
        )
    representable = abs(reference) < 1e38
    atol = 1e-7 if field in ("derivative", "intercept") else 1e-36
    np.testing.assert_allclose(value[representable], reference[representable], rtol=4e-6, atol=atol)
    assert np.isinf(value[abs(reference) > 1e39]).all()


@each
def test_inverse_derivative_and_conjugate(case, x64):
    divergence = case.divergence
    log_t = jnp.asarray(LOG_T)
    slope = divergence.derivative(log_t)
    v = jnp.linspace(-4, 4, 101)
    if divergence.inverse_derivative is not None:
        np.testing.assert_allclose(divergence.inverse_derivative(slope), np.exp(LOG_T), rtol=1e-11)
        beyond = divergence.inverse_derivative(v[v > case.slope_at_infinity])
        assert np.isposinf(beyond).all()
        assert not np.isnan(jax.vmap(jax.grad(divergence.inverse_derivative))(v)).any()
    if divergence.conjugate is not None:
        f = divergence.generator(log_t)
        at_slope = divergence.conjugate(slope)
        np.testing.assert_allclose(at_slope, np.exp(LOG_T) * slope - f, rtol=1e-9, atol=1e-12)
        young = f[:, None] + divergence.conjugate(v)[None] - np.exp(LOG_T)[:, None] * v[None]
        assert (young >= -1e-9).all()
        assert np.isposinf(divergence.conjugate(v[v > case.slope_at_infinity])).all()
        assert not np.isnan(jax.vmap(jax.grad(divergence.conjugate))(v)).any()


def random_pair(seed, size=6):
    pi, p = np.random.default_rng(seed).dirichlet(np.ones(size), 2)
    return jnp.log(pi), jnp.log(p), pi, p


@each
def test_exact_divergence_is_the_sum(case, x64):
    for seed in range(5):
        log_pi, log_p, pi, p = random_pair(seed)
        value = exact_divergence(log_pi, log_p, divergence=case.divergence)
        assert float(value) == pytest.approx((p * case.f(pi / p)).sum(), rel=1e-12)
        exchanged = exact_divergence(log_p, log_pi, divergence=case.divergence)
        assert float(exchanged) == pytest.approx((p * case.adjoint(pi / p)).sum(), rel=1e-12)
        assert float(exact_divergence(log_p, log_p, divergence=case.divergence)) == 0


@each
def test_disjoint_supports_reach_the_upper_end(case, x64):
    """f(0) + f'(∞), the largest value that D_f has."""
    log_pi, log_p = jnp.array([-LOG_2, -LOG_2, -jnp.inf]), jnp.array([-jnp.inf, -jnp.inf, 0.0])
    value = exact_divergence(log_pi, log_p, divergence=case.divergence)
    assert float(value) == pytest.approx(case.at_zero + case.slope_at_infinity, rel=1e-14)


@each
def test_members_without_mass_and_padding_change_nothing(case, x64):
    log_pi, log_p, *_ = random_pair(1)
    nowhere = jnp.full(2, -jnp.inf)

    def padded(log_pi):
        return exact_divergence(
            jnp.concatenate([log_pi, nowhere, jnp.ones(1)]),
            jnp.concatenate([log_p, nowhere, jnp.full(1, jnp.nan)]),
            divergence=case.divergence,
            where=jnp.arange(9) < 8,
        )

    def plain(log_pi):
        return exact_divergence(log_pi, log_p, divergence=case.divergence)

    (value, gradient), (expected, slope) = jax.jit(
        lambda x: [jax.value_and_grad(of)(x) for of in (padded, plain)]
    )(log_pi)
    assert float(value) == pytest.approx(float(expected), rel=1e-14)
    np.testing.assert_allclose(gradient, slope, rtol=1e-14)


@each
def test_gradient_of_exact_divergence_where_the_two_agree(case, x64):
    """At t = 1 exactly, `minimum` and `maximum` would each pass on half of f'(1): a regression
    test."""
    log_pi, log_p = jnp.log(jnp.array([0.5, 0.2, 0.3])), jnp.log(jnp.array([0.5, 0.3, 0.2]))
    gradient = jax.grad(lambda x: exact_divergence(x, log_p, divergence=case.divergence))(log_pi)
    expected = jnp.exp(log_pi) * case.divergence.derivative(log_pi - log_p)
    np.testing.assert_allclose(gradient, expected, rtol=1e-14, atol=1e-17)


@each
def test_gradient_of_exact_divergence_on_zeros(case, x64):
    """π f'(∞) where p = 0; 0 where π = 0 has nothing left to give; never NaN."""
    log_pi, log_p = jnp.array([-LOG_2, -LOG_2, -jnp.inf]), jnp.array([-jnp.inf, -LOG_2, -LOG_2])
    gradient = jax.grad(lambda x: exact_divergence(x, log_p, divergence=case.divergence))(log_pi)
    assert not np.isnan(gradient).any()
    assert float(gradient[0]) == pytest.approx(0.5 * case.slope_at_infinity, rel=1e-14)


def test_known_relations(x64):
    log_pi, log_p, pi, p = random_pair(3)

    def of(divergence, log_pi=log_pi, log_p=log_p):
        return float(exact_divergence(log_pi, log_p, divergence=divergence))

    middle = jnp.log((pi + p) / 2)
    halves = 0.5 * (of(reverse_kl(), log_p=middle) + of(reverse_kl(), log_pi=log_p, log_p=middle))
    assert of(jensen_shannon()) == pytest.approx(halves, rel=1e-12)
    assert of(forward_kl()) == pytest.approx((p * np.log(p / pi)).sum(), rel=1e-12)
    assert of(total_variation()) == pytest.approx(0.5 * abs(pi - p).sum(), rel=1e-12)
    assert of(total_variation()) <= np.sqrt(of(reverse_kl()) / 2)


def test_jensen_shannon_keeps_its_digits_near_the_target():
    """f(t) ≈ (log t)²/8 at 1e-4 is 1e-9: a difference of numbers near log 2 would have no digit
    left."""
    log_t = jnp.float32(1e-4)
    assert float(jensen_shannon().generator(log_t)) == pytest.approx(1.25006e-9, rel=1e-5)


def test_different_spaces_are_refused():
    with refused(r"\[2\] and \[3\]"):
        exact_divergence(jnp.zeros(2), jnp.zeros(3), divergence=forward_kl())
