"""Groups 21 to 34 of the catalogue: gradients by enumeration, closed forms, and the ends of the
number formats."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fjax import divergences as d
from fjax import (
    enumeration,
    estimators,
    log_probs,
    policy_gradients,
    preferences,
    surrogates,
    targets,
)
from fjax.rejection import accept, estimate_rejection, log_acceptance
from tests.cases import CASES, LOG_PROB_FN, SPACE, each, each_target, name, with_inverse, world
from tests.catalogue import distributions, equal, examples, float64, of, seeds

KL, REVERSE = d.reverse_kl(), d.forward_kl()


def gradient(small, log_p, divergence):
    return small.exact_gradient(log_p, divergence)


def expected(loss, small, log_p, log_q=None, samples=1):
    """Compiled, as `gradient` is: eager, it is a hundred small programs for every f."""
    return jax.jit(
        lambda log_p, log_q: enumeration.expected_gradient(
            loss, *small[:3], log_p, log_q, samples=samples
        )
    )(log_p, log_q)


@functools.partial(jax.jit, static_argnames="divergence")
def of_surrogate(params, log_p, *, divergence):
    return enumeration.expected_surrogate_gradient(
        LOG_PROB_FN, params, SPACE, log_p, divergence=divergence
    )


@functools.partial(jax.jit, static_argnames="divergence")
def exact_divergence(log_pi, log_p, *, divergence):
    return d.exact_divergence(log_pi, log_p, divergence=divergence)


def cosine(a, b):
    return float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


# ---- 24 to 26: gradients; 21 to 23 and 27 are in laws/test_expected_gradient.py
# ----------------------------------------------------------------------------------------------------


@float64
def test_24_rlhf_is_reverse_kl_to_the_tilted_base():
    small, beta = world(4), 0.3
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=7))
    log_a = small.log_q

    def objective(params):
        log_pi = small.log_prob_fn(params, *small.space)
        return jnp.exp(log_pi) @ (rewards - beta * (log_pi - log_a))

    of_objective = jax.grad(objective)(small.params)
    for shift in (0.0, 5.0):
        log_score = targets.reward_tilted(log_a, rewards + shift, beta=beta)
        # Z is only a shift of f'
        for log_p in (log_score - enumeration.exact_log_z(log_score), log_score):
            found = of_surrogate(small.params, log_p, divergence=KL)
            np.testing.assert_allclose(found, -of_objective / beta, atol=1e-10)

    def loss(log_pi, log_a, _):  # REINFORCE with k1 inside the reward
        index = jnp.argmin(abs(log_pi[:, None] - small.log_pi[None]), axis=1)
        return policy_gradients.reinforce(
            log_pi, rewards[index] - beta * policy_gradients.k1(log_pi, log_a)
        )

    np.testing.assert_allclose(expected(loss, small, log_a), -of_objective, atol=1e-10)


FREE = {"forward_kl", "reverse_kl", "pearson_chi2", "neyman_chi2", "squared_hellinger"}


@each
@float64
def test_25_whether_the_direction_depends_on_z(case):
    """Not for the α family; for all others, and most for total variation."""
    small = world(5)
    right = gradient(small, small.log_p, case.divergence)
    wrong = of_surrogate(small.params, small.log_p + np.log(3), divergence=case.divergence)
    if name(case) in FREE or name(case).startswith("alpha"):
        assert cosine(right, wrong) == pytest.approx(1, abs=1e-10)
    elif name(case) != "half_and_half":
        assert cosine(right, wrong) < 1 - 1e-6


def k_losses():
    """The k's as they are found in loss functions: differentiated."""
    return {
        "k1": lambda log_pi, log_a, _: log_pi - log_a,
        "k2": lambda log_pi, log_a, _: 0.5 * (log_pi - log_a) ** 2,
        "k3": lambda log_pi, log_a, _: jnp.expm1(log_a - log_pi) - (log_a - log_pi),
    }


@float64
def test_26_what_differentiating_the_k_estimators_gives():
    small = world(6)
    log_a, log_q = small.log_p, small.log_q
    reverse, forward = gradient(small, log_a, KL), gradient(small, log_a, REVERSE)
    losses = k_losses()
    np.testing.assert_allclose(expected(losses["k1"], small, log_a), 0, atol=1e-12)
    np.testing.assert_allclose(expected(losses["k2"], small, log_a), reverse, atol=1e-10)
    np.testing.assert_allclose(expected(losses["k3"], small, log_a), forward, atol=1e-10)
    assert cosine(forward, reverse) < 0.999
    for k in losses.values():
        off = expected(k, small, log_a, log_q)
        assert min(
            jnp.linalg.norm(off - reverse), jnp.linalg.norm(off - forward)
        ) > 0.05 * jnp.linalg.norm(reverse)

    def times_ratio(k):
        return lambda log_pi, log_a, log_q: (
            jnp.exp(log_pi - log_q) * losses[k](log_pi, log_a, log_q)
        )

    for k in ("k1", "k3"):
        np.testing.assert_allclose(
            expected(times_ratio(k), small, log_a, log_q), reverse, atol=1e-10
        )


@float64
def test_26_the_values_of_the_k_estimators():
    small = world(6)
    pi, log_a = jnp.exp(small.log_pi), small.log_p
    kl = float(exact_divergence(small.log_pi, log_a, divergence=KL))
    assert float(pi @ policy_gradients.k1(small.log_pi, log_a)) == pytest.approx(kl, rel=1e-12)
    assert float(pi @ policy_gradients.k3(small.log_pi, log_a)) == pytest.approx(kl, rel=1e-12)
    assert float(pi @ policy_gradients.k2(small.log_pi, log_a)) != pytest.approx(kl, rel=1e-2)
    for case in CASES:
        k = jax.jit(functools.partial(policy_gradients.k_estimator, divergence=case.divergence))(
            small.log_pi, log_a
        )
        exact = float(exact_divergence(small.log_pi, log_a, divergence=case.divergence))
        assert (k >= 0).all()
        assert float(pi @ k) == pytest.approx(exact, rel=1e-10)


@each
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
@float64
def test_26_the_penalty_has_the_value_and_the_gradient(case, off_policy):
    small = world(6)

    def penalty(log_pi, log_a, log_q):
        return policy_gradients.divergence_penalty(log_pi, log_a, log_q, divergence=case.divergence)

    log_q = small.log_q if off_policy else None
    found = expected(penalty, small, small.log_p, log_q)
    np.testing.assert_allclose(found, gradient(small, small.log_p, case.divergence), atol=1e-10)
    sampled = small.log_q if off_policy else small.log_pi
    value = jnp.exp(sampled) @ jax.jit(penalty)(small.log_pi, small.log_p, log_q)
    exact = exact_divergence(small.log_pi, small.log_p, divergence=case.divergence)
    assert float(value) == pytest.approx(float(exact), rel=1e-10)


@float64
def test_26_trajectory_balance():
    """On-policy it is reverse KL, for any Z; with its own estimate of Z shrunk by (n-1)/n; and ψ
    for every f."""
    small = world(6)
    reverse = gradient(small, small.log_p, KL)

    def balance(log_pi, log_p, _):
        return policy_gradients.trajectory_balance(log_pi, log_p + 2, jnp.asarray(2.5))

    def own_z(log_pi, log_p, _):
        return policy_gradients.trajectory_balance(log_pi, log_p + 2)

    np.testing.assert_allclose(expected(balance, small, small.log_p), reverse, atol=1e-10)
    np.testing.assert_allclose(
        expected(own_z, small, small.log_p, samples=3), 2 / 3 * reverse, atol=1e-10
    )
    assert policy_gradients.trajectory_balance(small.log_p, small.log_p + 2) == pytest.approx(
        0, abs=1e-20
    )
    for case in CASES:

        def psi(log_pi, log_p, _, f=case.divergence):
            return policy_gradients.f_trajectory_balance(log_pi, log_p, divergence=f)

        np.testing.assert_allclose(
            expected(psi, small, small.log_p),
            gradient(small, small.log_p, case.divergence),
            atol=1e-10,
        )


# ---- 28 to 32: closed forms
# -------------------------------------------------------------------------------------------------


@each_target
@float64
def test_28_the_factorised_target_is_the_target(case, hard):
    log_prob_fn, _ = enumeration.tabular_log_prob_fn(3, 3)
    space = enumeration.sequences(3, 3, eos_id=0)
    rng = np.random.default_rng(0)
    log_p = jax.nn.log_softmax(
        jnp.where(
            (space.tokens == 2).any(1) | (not hard), jnp.asarray(rng.normal(size=15)), -jnp.inf
        )
    )
    params = enumeration.factorize(log_p + 7.0, space, vocab_size=3)
    log_pi = log_prob_fn(params, *space)
    np.testing.assert_allclose(jnp.exp(log_pi), jnp.exp(log_p), atol=1e-14)
    assert float(exact_divergence(log_pi, log_p, divergence=case.divergence)) == pytest.approx(
        0, abs=1e-10
    )


@with_inverse
@float64
def test_28_no_policy_beats_the_regularised_optimum(case):
    f = case.divergence
    rng, beta = np.random.default_rng(0), 0.4
    log_a, rewards = (
        jnp.log(jnp.asarray(rng.dirichlet(np.ones(6)))),
        jnp.asarray(rng.normal(size=6)),
    )

    def objective(log_pi):
        return float(
            jnp.exp(log_pi) @ rewards - beta * exact_divergence(log_pi, log_a, divergence=f)
        )

    best = policy_gradients.f_regularized_optimum(log_a, rewards, beta=beta, divergence=f)
    assert float(jnp.exp(best).sum()) == pytest.approx(1, abs=1e-10)
    top = objective(best)
    for scale in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(5):
            other = jnp.exp(best) * np.exp(scale * rng.normal(size=6)) + 1e-9 * scale
            assert objective(jnp.log(other / other.sum())) <= top + 1e-9
    if f.name in ("reverse_kl", "alpha=1"):
        log_score = targets.reward_tilted(log_a, rewards, beta=beta)
        np.testing.assert_allclose(best, jax.nn.log_softmax(log_score), atol=1e-9)
        assert top == pytest.approx(beta * float(enumeration.exact_log_z(log_score)), rel=1e-9)


def exponential(log_a, features, moments):
    fit = targets.fit_coefficients(features, moments, log_weights=log_a)
    log_score = targets.exponential_family(log_a, features, fit.coefficients)
    return fit, log_score - enumeration.exact_log_z(log_score)


@examples(10)
@given(seed=st.integers(0, 10**6))
@float64
def test_29_moments_are_met_by_the_closest_distribution(seed):
    rng = np.random.default_rng(seed)
    log_a = jnp.log(jnp.asarray(rng.dirichlet(np.ones(12))))
    features = jnp.asarray(rng.normal(size=(12, 3)))
    inside = rng.dirichlet(np.ones(12))  # its moments can be met, by itself for one
    moments = jnp.asarray(inside) @ features
    fit, log_p = exponential(log_a, features, moments)
    assert fit.converged
    np.testing.assert_allclose(jnp.exp(log_p) @ features, moments, atol=1e-8)
    kl = float(exact_divergence(log_p, log_a, divergence=KL))
    assert kl == pytest.approx(float(fit.coefficients @ moments - fit.log_z), abs=1e-8)
    with np.errstate(divide="ignore"):
        log_c = jnp.log(jnp.asarray(inside))
    to_base, to_p = (float(exact_divergence(log_c, x, divergence=KL)) for x in (log_a, log_p))
    assert to_base == pytest.approx(to_p + kl, rel=1e-7)  # Pythagoras
    assert kl <= to_base + 1e-9


@float64
def test_29_a_single_boolean_feature_and_a_hard_one():
    rng = np.random.default_rng(0)
    log_a = jnp.log(jnp.asarray(rng.dirichlet(np.ones(10))))
    fires = jnp.arange(10) % 3 == 0
    rate = float(jnp.exp(log_a) @ fires)
    fit, _ = exponential(log_a, fires[:, None].astype(float), jnp.array([0.5]))
    assert float(fit.coefficients[0]) == pytest.approx(-np.log(rate / (1 - rate)), abs=1e-8)
    features = jnp.stack([fires, jnp.arange(10) < 5], axis=1).astype(float)
    # a hybrid: the one always, the other half of the time
    fit, log_p = exponential(log_a, features, jnp.array([1.0, 0.5]))
    assert fit.coefficients[0] == np.inf
    assert fit.converged
    np.testing.assert_allclose(jnp.exp(log_p) @ features, [1.0, 0.5], atol=1e-8)
    pointwise = targets.pointwise(log_a, fires)
    assert (
        float(fit.log_z)
        <= float(enumeration.exact_log_z(pointwise)) + abs(float(fit.coefficients[1])) + 1e-9
    )


@examples(10)
@given(seed=seeds)
@float64
def test_30_pointwise_targets(seed):
    pi, a = distributions(seed, 2, zeros=False)
    satisfied = np.random.default_rng(seed).uniform(size=a.shape) < 0.5
    satisfied[:, 0] = True
    rate = (a * satisfied).sum(axis=1)
    p = a * satisfied / rate[:, None]
    equal(of(KL, p, a), -np.log(rate), 1e-8)
    hits = (pi * satisfied).sum(axis=1)
    best = pi * satisfied / hits[:, None]
    left = of(KL, p, pi)
    assert (left >= -np.log(hits) - 1e-8).all()
    # GUARD: what rejection removes is exactly -log of its rate
    equal(left, of(KL, p, best) - np.log(hits), 1e-8)


@float64
def test_30_quasi_rejection():
    """Acceptance rate Z_β/β, TV within its bound and falling in β, exact from β = max P/q on."""
    rng = np.random.default_rng(0)
    log_q = jnp.log(jnp.asarray(rng.dirichlet(np.ones(20))))
    log_score = jnp.log(jnp.asarray(np.where(np.arange(20) % 3 == 0, 0.0, rng.uniform(size=20))))
    log_p, z = jax.nn.log_softmax(log_score), float(jnp.exp(log_score).sum())
    last = 1.0
    for log_beta in np.linspace(-3, float((log_score - log_q).max()), 12):
        rate = jnp.exp(log_q + log_acceptance(log_score, log_q, log_beta=log_beta))
        z_beta = float(jnp.minimum(jnp.exp(log_score), np.exp(log_beta) * jnp.exp(log_q)).sum())
        assert float(rate.sum()) == pytest.approx(z_beta / np.exp(log_beta), rel=1e-12)
        tv = float(
            exact_divergence(jnp.log(rate / rate.sum()), log_p, divergence=d.total_variation())
        )
        assert tv <= 1 - z_beta / z + 1e-12
        assert tv <= last + 1e-12
        last = tv
        rows = jax.random.categorical(jax.random.key(0), log_q, shape=(20_000,))
        estimate = estimate_rejection(log_score[rows], log_q[rows], log_beta=log_beta)
        for found, exact in (
            (estimate.acceptance_rate, float(rate.sum())),
            (estimate.tv_bound, 1 - z_beta / z),
        ):
            assert abs(float(found.value) - exact) <= 5 * float(found.std_error) + 1e-12
        known = estimators.Estimate(jnp.log(z), jnp.zeros(()), jnp.zeros(()))
        with_z = estimate_rejection(
            log_score[rows], log_q[rows], log_beta=log_beta, log_z=known
        ).tv_bound
        assert abs(float(with_z.value) - (1 - z_beta / z)) <= 5 * float(with_z.std_error) + 1e-12
        kept = accept(jax.random.key(1), log_score[rows], log_q[rows], log_beta=log_beta)
        assert (rows[kept] % 3 != 0).all()
        spread = np.sqrt(float(rate.sum()) / 20_000)
        assert abs(float(kept.mean()) - float(rate.sum())) <= 5 * spread
    assert last == pytest.approx(0, abs=1e-12)


@examples(10)
@given(seed=seeds)
@float64
def test_31_normaliser_weights_and_effective_samples(seed):
    rng = np.random.default_rng(seed)
    q, score, values = rng.dirichlet(np.ones(6)), rng.uniform(size=6), rng.normal(size=6)
    pairs = np.array(list(itertools.product(range(6), repeat=2)))
    log_q, log_score = jnp.log(jnp.asarray(q)), jnp.log(jnp.asarray(score))
    z = jax.vmap(
        lambda rows: jnp.exp(estimators.estimate_log_z(log_score[rows], log_q[rows]).value)
    )(pairs)
    assert float((q[pairs].prod(axis=1) * z).sum()) == pytest.approx(score.sum(), rel=1e-12)
    log_weights = log_score - log_q
    plain, scaled = (
        estimators.estimate_mean(jnp.asarray(values), log_weights + shift) for shift in (0.0, 300.0)
    )
    np.testing.assert_allclose(plain, scaled, rtol=1e-10)
    assert 1 - 1e-12 <= float(estimators.effective_sample_size(log_weights)) <= 6 + 1e-12


@examples(10)
@given(seed=seeds, shift=st.floats(-5, 5))
@float64
def test_32_preference_losses(seed, shift):
    pairs = jnp.asarray(np.random.default_rng(seed).normal(scale=2, size=(4, 16)))
    log_pi, log_a, beta = pairs[:2], pairs[2:], 0.3
    swapped = (log_pi[1], log_pi[0], log_a[1], log_a[0])
    pairs = (*log_pi, *log_a)
    plain = preferences.dpo(*pairs, beta=beta)
    np.testing.assert_allclose(
        preferences.f_dpo(*pairs, beta=beta, divergence=KL), plain, rtol=1e-12
    )
    np.testing.assert_allclose(
        preferences.f_dpo(*pairs, beta=beta, divergence=d.alpha_divergence(1.0 - 1e-9)),
        plain,
        rtol=1e-6,
    )
    margin = beta * ((log_pi[0] - log_a[0]) - (log_pi[1] - log_a[1]))
    np.testing.assert_allclose(
        preferences.dpo(*swapped, beta=beta), plain + margin, rtol=1e-9, atol=1e-12
    )
    same = (*log_a, *log_a)
    for case in CASES:
        if np.isneginf(case.divergence.derivative(-jnp.inf)):
            at_base = preferences.f_dpo(*same, beta=beta, divergence=case.divergence)
            np.testing.assert_allclose(at_base, np.log(2), rtol=1e-12)
    # Adding a reward to both responses, that is moving both ratios by one factor, changes nothing
    # in DPO, IPO and EXO.
    moved = (log_pi[0] + shift, log_pi[1] + shift, *log_a)
    for loss in (preferences.dpo, preferences.ipo, preferences.exo_pair):
        np.testing.assert_allclose(
            loss(*moved, beta=beta), loss(*pairs, beta=beta), rtol=1e-7, atol=1e-9
        )
    # Without its u, χPO is DPO.
    u = [jnp.exp(log_pi[i] - log_a[i]) for i in (0, 1)]
    loss = preferences.chi_po(*pairs, beta=beta)
    exact = (loss > 1e-9) & (loss < 30)  # where its inverse has digits
    link = -jnp.log(jnp.expm1(loss)) - beta * (u[0] - u[1])
    np.testing.assert_allclose(link[exact], margin[exact], rtol=1e-6, atol=1e-6)
    for i in range(4):
        log_u, rewards = (
            log_pi[:, i] - log_a[:, i],
            jnp.array([1.0, -1.0]) * 0.5 * np.log((1 - 1e-2) / 1e-2),
        )
        pair = preferences.exo_pair(*(x[i] for x in pairs), beta=beta, label_smoothing=1e-2)
        both = {"beta": beta, "reward_beta": 1.0}
        zeros = jnp.zeros(2)
        assert float(
            preferences.f_po(log_u, zeros, rewards, divergence=KL, **both)
        ) == pytest.approx(float(pair), rel=1e-8)
        assert float(preferences.exo(log_u, zeros, rewards, **both)) == pytest.approx(
            float(pair), rel=1e-8
        )


# ---- 33 and 34: the ends of the number formats
# ------------------------------------------------------------------------------

LOG_T = jnp.array([-jnp.inf, -1e4, -88.0, -1e-8, 0.0, 1e-8, 88.0, 1e4, jnp.inf])


@each
def test_33_float32_never_gives_nan(case):
    assert not np.isnan(case.divergence.derivative(LOG_T)).any()
    log_pi = jnp.where(jnp.isneginf(LOG_T), -jnp.inf, jnp.minimum(LOG_T, 0.0))
    log_p = jnp.where(jnp.isposinf(LOG_T), -jnp.inf, jnp.minimum(-LOG_T, 0.0))

    def total(log_pi, log_q):
        loss = surrogates.surrogate_loss(
            log_pi, log_p, log_q, divergence=case.divergence, clip=(-1e6, 1e6), baseline=0.1
        )
        return loss.sum()

    slopes = jax.jit(lambda x, q: [jax.grad(total)(x, None), jax.grad(total)(x, q)])
    assert not np.isnan(slopes(log_pi, jnp.full_like(log_pi, -50.0))).any()
    exact = jax.jit(
        jax.grad(
            lambda x: d.exact_divergence(x, jnp.array([0.0, -jnp.inf]), divergence=case.divergence)
        )
    )
    assert not np.isnan(exact(jnp.array([-1.0, -0.5]))).any()


def test_33_total_variation_at_its_kink_and_z_of_improbable_sequences():
    assert float(d.total_variation().derivative(jnp.zeros(()))) == 0
    running = estimators.running_log_mean()
    state = running.init()
    for seed in range(20):
        state = running.update(state, -1000 + jax.random.normal(jax.random.key(seed), (100,)))
    every = np.concatenate(
        [np.asarray(jax.random.normal(jax.random.key(s), (100,)), np.float64) for s in range(20)]
    )
    assert float(running.estimate(state).value) + 1000 == pytest.approx(
        np.log(np.exp(every).mean()), abs=2e-4
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_34_half_precision_logits_are_summed_in_float32(dtype):
    logits = (jax.random.normal(jax.random.key(0), (2, 200, 50)) * 3).astype(dtype)
    tokens = jax.random.randint(jax.random.key(1), (2, 200), 0, 50)
    where = jnp.ones((2, 200), bool).at[:, 0].set(False)
    found = log_probs.sequence_log_probs(logits, tokens, where=where)
    wide = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    exact = jnp.take_along_axis(wide, tokens[:, 1:, None], axis=-1)[..., 0].sum(axis=1)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_every_group_of_the_catalogue_is_here():
    """By name, in this file, test_catalogue_laws.py and laws/."""
    import re
    from pathlib import Path

    folder = Path(__file__).parent
    files = [*folder.glob("test_catalogue_*.py"), *folder.glob("laws/test_*.py")]
    text = "".join(file.read_text() for file in files)
    assert {int(n) for n in re.findall(r"^def test_(\d\d)_", text, re.MULTILINE)} == set(
        range(1, 35)
    )
