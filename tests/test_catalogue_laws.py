"""Groups 1 to 20 of the catalogue: structure of f-divergences and the inequalities between them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fjax import divergences as d
from fjax import enumeration
from tests.cases import CASES, each, name, smooth, with_conjugate, world
from tests.catalogue import at_most, distributions, equal, examples, float64, of, seeds

KL, REVERSE, TV, JS, H2 = (
    d.reverse_kl(),
    d.forward_kl(),
    d.total_variation(),
    d.jensen_shannon(),
    d.squared_hellinger(),
)
CHI2, DELTA, J = d.pearson_chi2(), d.triangular_discrimination(), d.jeffreys()
"""KL is KL(first‖second), as in the catalogue; REVERSE the other way round."""


@each
@examples()
@given(seed=seeds)
@float64
def test_01_positive_and_zero_only_at_equality(case, seed):
    pi, p = distributions(seed, 2)
    value = of(case.divergence, pi, p)
    at_most(np.zeros_like(value), value, 1e-12)
    equal(of(case.divergence, p, p), np.zeros(len(p)), 1e-12)
    assert (value[of(TV, pi, p) > 1e-2] > 0).all()


@each
@examples()
@given(log_t=st.lists(st.floats(-3, 3), min_size=2, max_size=6))
@float64
def test_02_the_functions_are_of_one_convex_f(case, log_t):
    log_t = np.sort(np.array(log_t))
    log_t = log_t[abs(log_t) > 1e-3]
    divergence = case.divergence
    slope = np.asarray(divergence.derivative(jnp.asarray(log_t)))
    t, h = np.exp(log_t.astype(np.longdouble)), np.longdouble(1e-5)
    numeric = ((case.f(t * (1 + h)) - case.f(t * (1 - h))) / (2 * h * t)).astype(float)
    np.testing.assert_allclose(slope, numeric, rtol=1e-6, atol=1e-6)
    assert (np.diff(slope) >= -1e-12).all()
    assert float(divergence.generator(jnp.zeros(()))) == 0
    assert float(divergence.slope_at_infinity) == pytest.approx(case.slope_at_infinity, rel=1e-12)
    assert case.curvature is None or float(divergence.curvature) == pytest.approx(
        case.curvature, rel=1e-12
    )


def shifted(f: d.FDivergence, c: float) -> d.FDivergence:
    return f._replace(
        generator=lambda s: f.generator(s) + c * jnp.expm1(s),
        derivative=lambda s: f.derivative(s) + c,
        integrand=lambda s: f.integrand(s) - c * jnp.expm1(-s),
    )


@functools.cache
def value_of_shifted(f: d.FDivergence):
    def value(log_pi, log_p, c):
        return d.exact_divergence(log_pi, log_p, divergence=shifted(f, c))

    return jax.jit(jax.vmap(value, (0, 0, None)))


@each
@examples(4)
@given(seed=seeds, c=st.floats(-5, 5))
@float64
def test_03_a_multiple_of_t_minus_1_changes_nothing(case, seed, c):
    pi, p = distributions(seed, 2, zeros=False)
    value = of(case.divergence, pi, p)
    changed = np.asarray(value_of_shifted(case.divergence)(jnp.log(pi), jnp.log(p), c))
    some = abs(value) < 1e6
    equal(changed[some], value[some], 1e-9)


@each
@float64
def test_03_nor_does_it_change_the_gradient(case):
    small = world()
    plain, changed = (
        small.exact_gradient(small.log_p, f)
        for f in (case.divergence, shifted(case.divergence, 3.0))
    )
    np.testing.assert_allclose(changed, plain, atol=1e-10)


@functools.cache
def value_of_sum(f: d.FDivergence, without: bool):
    def value(log_pi, log_p, a, b):
        combined = d.mixture([f, TV], [0.0 if without else a, b])
        return d.exact_divergence(log_pi, log_p, divergence=combined)

    return jax.jit(jax.vmap(value, (0, 0, None, None)))


@each
@examples(4)
@given(seed=seeds, a=st.just(0.0) | st.floats(0.01, 3), b=st.floats(0.1, 3))
@float64
def test_04_linear_in_f(case, seed, a, b):
    pi, p = distributions(seed, 2)
    value = value_of_sum(case.divergence, a == 0)(jnp.log(pi), jnp.log(p), a, b)
    expected = b * of(TV, pi, p) + (a * of(case.divergence, pi, p) if a > 0 else 0)
    equal(np.asarray(value), expected, 1e-9)


@each
@examples(4)
@given(seed=seeds)
@float64
def test_05_the_dual_exchanges_the_arguments(case, seed):
    pi, p = distributions(seed, 2)
    equal(of(d.dual(case.divergence), pi, p), of(case.divergence, p, pi), 1e-9)


PAIRS = [(f, f) for f in (TV, JS, H2, J, DELTA)] + [
    (KL, REVERSE),
    (CHI2, d.neyman_chi2()),
    (d.alpha_divergence(0.3), d.alpha_divergence(0.7)),
    (d.alpha_divergence(-0.5), d.alpha_divergence(1.5)),
    (d.generalized_jensen_shannon(0.1), d.generalized_jensen_shannon(0.9)),
]


@pytest.mark.parametrize(("f", "g"), PAIRS, ids=[f"{f.name}-{g.name}" for f, g in PAIRS])
@examples()
@given(seed=seeds)
@float64
def test_05_known_duals(f, g, seed):
    pi, p = distributions(seed, 2)
    equal(of(f, pi, p), of(g, p, pi), 1e-9)


@each
@examples()
@given(seed=seeds)
@float64
def test_06_the_range_ends_where_supports_are_disjoint(case, seed):
    pi, p = distributions(seed, 2)
    value, most = of(case.divergence, pi, p), case.at_zero + case.slope_at_infinity
    at_most(value, np.full_like(value, most))
    apart = ~((pi > 0) & (p > 0)).any(axis=1)
    equal(value[apart], np.full(apart.sum(), most))


@each
@examples()
@given(seed=seeds)
@float64
def test_07_processing_never_adds(case, seed):
    pi, p = distributions(seed, 2)
    kernel = np.random.default_rng(seed).dirichlet(np.ones(8), size=(len(p), 8))
    merged_pi, merged_p = (np.einsum("bi,bij->bj", x, kernel) for x in (pi, p))
    at_most(of(case.divergence, merged_pi, merged_p), of(case.divergence, pi, p))
    # A sufficient statistic: two atoms with one ratio become one.
    halves = [np.concatenate([x[:, :7], x[:, 7:] / 2, x[:, 7:] / 2], axis=1) for x in (pi, p)]
    equal(of(case.divergence, *halves), of(case.divergence, pi, p))


@each
@examples()
@given(seed=seeds, share=st.floats(0, 1))
@float64
def test_08_jointly_convex(case, seed, share):
    pi, p, pi2, p2 = distributions(seed, 4)
    mixed = of(case.divergence, share * pi + (1 - share) * pi2, share * p + (1 - share) * p2)
    parts = [
        w * v
        for w, v in ((share, of(case.divergence, pi, p)), (1 - share, of(case.divergence, pi2, p2)))
        if w > 0
    ]
    at_most(mixed, sum(parts), 1e-8)


@each
@examples()
@given(seed=seeds, share=st.floats(0.01, 1))
@float64
def test_09_order_and_empty_atoms_do_not_matter_and_common_noise_shrinks(case, seed, share):
    pi, p, r = distributions(seed, 3)
    order = np.random.default_rng(seed).permutation(8)
    value = of(case.divergence, pi, p)
    equal(of(case.divergence, pi[:, order], p[:, order]), value)
    noisy = of(case.divergence, share * pi + (1 - share) * r, share * p + (1 - share) * r)
    at_most(noisy, share * value, 1e-8)


@smooth
@float64
def test_10_near_the_target_all_are_one_quadratic_form(case):
    rng = np.random.default_rng(0)
    q, direction = rng.dirichlet(np.full(6, 5.0)), rng.normal(size=6)
    direction -= direction.mean()
    epsilon = 1e-4
    both = [  # terms of third order have opposite signs
        float(of(case.divergence, (q + step * direction)[None], q[None])[0])
        for step in (epsilon, -epsilon)
    ]
    expected = case.curvature / 2 * (direction**2 / q).sum()
    assert sum(both) / 2 / epsilon**2 == pytest.approx(expected, rel=1e-4)

    logits = jnp.asarray(rng.normal(size=5))
    target = jax.nn.log_softmax(logits)
    hessian = jax.jit(jax.hessian(
        lambda x: d.exact_divergence(jax.nn.log_softmax(x), target, divergence=case.divergence)
    ))(logits + 1e-9)  # fmt: skip
    fisher = jnp.diag(jnp.exp(target)) - jnp.outer(jnp.exp(target), jnp.exp(target))
    np.testing.assert_allclose(hessian, case.curvature * fisher, atol=1e-6)


@with_conjugate
@examples()
@given(seed=seeds)
@float64
def test_11_fenchel_and_young(case, seed):
    divergence = case.divergence
    pi, p = distributions(seed, 2, zeros=False)
    inside = (pi > 1e-3) & (p > 1e-3)
    log_t = np.log(np.where(inside, pi, 1)) - np.log(np.where(inside, p, 1))
    best = np.asarray(divergence.derivative(jnp.asarray(log_t)))
    rng = np.random.default_rng(seed)
    for test_function in (best, best - rng.uniform(0, 1, best.shape)):
        conjugate = np.asarray(divergence.conjugate(jnp.asarray(test_function)))
        lower = np.where(inside, pi * test_function - p * conjugate, 0)
        terms = np.where(inside, p * np.asarray(divergence.generator(jnp.asarray(log_t))), 0)
        at_most(lower, terms, 1e-8)
        if test_function is best:
            equal(lower, terms, 1e-7)
    if divergence.inverse_derivative is not None:
        np.testing.assert_allclose(
            divergence.inverse_derivative(jnp.asarray(best)), np.exp(log_t), rtol=1e-6
        )


@examples()
@given(seed=seeds)
@float64
def test_12_limits_of_the_families(seed):
    pi, p = distributions(seed, 2, zeros=False)
    kl, reverse = of(KL, pi, p), of(REVERSE, pi, p)
    with np.errstate(divide="ignore", invalid="ignore"):
        moderate = np.nanmax(abs(np.log(pi / p)), axis=1) < 4
    for small in (1e-3, 1e-6):
        for a, expected in ((small, reverse), (-small, reverse), (1 - small, kl), (1 + small, kl)):
            value = of(d.alpha_divergence(a), pi, p)
            equal(value[moderate], expected[moderate], 20 * small)
        low, high = d.generalized_jensen_shannon(small), d.generalized_jensen_shannon(1 - small)
        for f, expected in ((low, kl), (high, reverse)):
            value = of(f, pi, p) / small
            at_most(value[moderate], expected[moderate], 1e-6)
    equal(of(d.alpha_divergence(0.0), pi, p), reverse)
    equal(of(d.alpha_divergence(1.0), pi, p), kl)


@float64
def test_12_the_alpha_family_has_no_seam():
    """Across 0, ½, 1 and 1½, where the formulas change, values move by no more than α does."""
    log_t = jnp.linspace(-30, 30, 241)
    for a in (0.0, 0.5, 1.0, 1.5):
        low, high = d.alpha_divergence(a - 1e-10), d.alpha_divergence(a + 1e-10)
        for field in ("generator", "integrand", "derivative"):
            x, y = getattr(low, field)(log_t), getattr(high, field)(log_t)
            np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-12)


@examples()
@given(seed=seeds)
@float64
def test_13_pinsker_and_bretagnolle_huber(seed):
    p, q = distributions(seed, 2)
    tv, kl = of(TV, p, q), np.maximum(of(KL, p, q), 0)
    at_most(tv, np.sqrt(kl / 2))
    at_most(tv, np.sqrt(-np.expm1(-kl)))
    at_most(np.sqrt(-np.expm1(-kl)), 1 - np.exp(-kl) / 2)


@examples()
@given(seed=seeds)
@float64
def test_14_hellinger_and_total_variation(seed):
    p, q = distributions(seed, 2)
    tv, h2 = of(TV, p, q), of(H2, p, q)
    at_most(h2 / 2, tv)
    at_most(tv, np.sqrt(np.maximum(h2 * (1 - h2 / 4), 0)))


@examples()
@given(seed=seeds)
@float64
def test_15_kl_and_chi_square(seed):
    p, q = distributions(seed, 2)
    tv, h2, kl, chi2 = (of(f, p, q) for f in (TV, H2, KL, CHI2))
    overlap = np.log(np.maximum((np.sqrt(p) * np.sqrt(q)).sum(axis=1), 1e-320))
    at_most(kl, np.log1p(chi2), 1e-8)
    at_most(np.log1p(chi2), chi2)
    at_most(h2, kl)
    at_most(-2 * overlap, kl, 1e-8)
    at_most(h2, chi2)
    at_most(tv, np.sqrt(np.maximum(chi2, 0)) / 2)


@examples()
@given(seed=seeds)
@float64
def test_16_jensen_shannon(seed):
    p, q = distributions(seed, 2)
    tv, h2, js, j = (of(f, p, q) for f in (TV, H2, JS, J))
    at_most(tv**2 / 2, js)
    at_most(js, np.log(2) * tv)
    at_most(js, np.full_like(js, np.log(2)))
    at_most(h2 / 4, js)
    at_most(js, h2 / 2)
    at_most(js, j / 8)
    at_most(js, np.log(2 / (1 + np.exp(-j / 2))))


@examples()
@given(seed=seeds)
@float64
def test_17_triangular_discrimination(seed):
    p, q = distributions(seed, 2)
    tv, h2, js, delta = (of(f, p, q) for f in (TV, H2, JS, DELTA))
    at_most(delta / 4, js)
    at_most(js, delta * np.log(2) / 2)
    at_most(delta / 2, h2)
    at_most(h2, delta)
    at_most(2 * tv**2, delta)
    at_most(delta, 2 * tv)


@examples()
@given(seed=seeds)
@float64
def test_18_bounds_of_the_families(seed):
    p, q = distributions(seed, 2)
    kl = of(KL, p, q)
    for weight in (0.1, 0.8):
        value = of(
            next(c.divergence for c in CASES if name(c) == f"generalized_jensen_shannon={weight}"),
            p,
            q,
        )
        entropy = -weight * np.log(weight) - (1 - weight) * np.log(1 - weight)
        at_most(value, np.full_like(value, entropy))
        at_most(value, weight * kl)
    for a in (0.3, 0.75):
        value = of(next(c.divergence for c in CASES if name(c) == f"alpha={a}"), p, q)
        at_most(value, np.full_like(value, 1 / (a * (1 - a))))


def renyi(a: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """log(1 + a(a-1) D_a)/(a-1), which is how Rényi's divergence and the α one belong together."""
    value = of(next(c.divergence for c in CASES if name(c) == f"alpha={a:g}"), p, q)
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(1 + a * (a - 1) * value, 0)) / (a - 1)


@examples()
@given(seed=seeds)
@float64
def test_19_renyi_grows_with_its_order_and_roots_are_metrics(seed):
    p, q, r = distributions(seed, 3)
    orders = (
        [renyi(a, p, q) for a in (0.3, 0.75)]
        + [of(KL, p, q)]
        + [renyi(a, p, q) for a in (1.25, 2.5)]
    )
    for lower, higher in itertools.pairwise(orders):
        known = (lower < 15) & (higher < 15)  # beyond, 1 + a(a-1) D_a has no digits left
        at_most(lower[known], higher[known], 1e-7)
    for f, root in ((TV, lambda x: x), (H2, np.sqrt), (JS, np.sqrt), (DELTA, np.sqrt)):
        pq, qr, pr = (root(np.maximum(of(f, *pair), 0)) for pair in ((p, q), (q, r), (p, r)))
        at_most(pr, pq + qr, 1e-8)


@examples()
@given(seed=seeds)
@float64
def test_20_products_and_the_chain_rule(seed):
    p1, q1, p2, q2 = (x[:, :4] + 1e-3 for x in distributions(seed, 4, zeros=False))
    p1, q1, p2, q2 = (x / x.sum(axis=1, keepdims=True) for x in (p1, q1, p2, q2))

    def both(a, b):
        return np.einsum("bi,bj->bij", a, b).reshape(len(a), -1)

    p, q = both(p1, p2), both(q1, q2)
    equal(of(KL, p, q), of(KL, p1, q1) + of(KL, p2, q2))
    equal(1 - of(H2, p, q) / 2, (1 - of(H2, p1, q1) / 2) * (1 - of(H2, p2, q2) / 2))
    equal(1 + of(CHI2, p, q), (1 + of(CHI2, p1, q1)) * (1 + of(CHI2, p2, q2)), 1e-8)
    at_most(of(TV, p, q), of(TV, p1, q1) + of(TV, p2, q2))


@float64
def test_20_kl_of_sequences_is_the_sum_over_positions():
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 3)
    space = enumeration.sequences(3, 3, eos_id=0)
    rng = np.random.default_rng(0)
    pi, a = (jnp.asarray(rng.normal(size=(prefixes, 3))) for _ in range(2))
    log_pi, log_a = (log_prob_fn(x, *space) for x in (pi, a))
    total = 0.0
    tables = [jax.nn.log_softmax(x) for x in (pi, a)]
    rows, weights = [0] * len(space.tokens), jnp.exp(log_pi)
    first = [0, 1, 4]
    for position in range(3):
        index = np.array([first[position] + row for row in rows])
        counted = np.asarray(space.where[:, position])
        step = (jnp.exp(tables[0][index]) * (tables[0][index] - tables[1][index])).sum(axis=1)
        total += float((weights * step * counted).sum())
        rows = [
            row * 3 + int(token) for row, token in zip(rows, space.tokens[:, position], strict=True)
        ]
    expected = d.exact_divergence(log_pi, log_a, divergence=KL)
    assert total == pytest.approx(float(expected), rel=1e-12)
