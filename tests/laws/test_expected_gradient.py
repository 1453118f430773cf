"""The one home of the expected gradient: E_q[(π/q)(f'(π/p) - B) ∇log π] = ∇D_f(π‖p), and what
breaks it.

An f comes into the surrogate through its score weights alone, seven numbers here, and a baseline
sees no more than these. So every f is summed without a baseline of samples; baselines over all
draws for any numbers as weights; and both together for the four of the f-DPG paper.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration, surrogates
from tests.cases import LOG_PROB_FN, SPACE, each, each_target, each_target_of_the_paper, world

both_policies = pytest.mark.parametrize(
    "off_policy", [False, True], ids=["on-policy", "off-policy"]
)


def expected(loss, small, log_p, log_q=None, samples=1):
    """Compiled: the many small programs of a sum that is not take ten times as long."""
    return jax.jit(
        lambda log_p, log_q: enumeration.expected_gradient(
            loss, *small[:3], log_p, log_q, samples=samples
        )
    )(log_p, log_q)


@functools.partial(jax.jit, static_argnames="divergence")
def of_surrogate(params, log_p, log_q, baseline, *, divergence):
    def loss(log_pi, log_p, log_q):
        return surrogates.surrogate_loss(
            log_pi, log_p, log_q, divergence=divergence, baseline=baseline
        )

    return enumeration.expected_gradient(loss, LOG_PROB_FN, params, SPACE, log_p, log_q)


@each_target
@both_policies
def test_21_every_f_has_its_exact_gradient(case, hard, off_policy, x64):
    """Three ways to one gradient: autodiff of D_f, the sum of π f'(π/p) ∇log π, and the surrogate,
    whatever the number B; with zeros in p wherever f'(∞) is finite."""
    for small in (world(0), world(1)):
        log_p, f = small.target(hard=hard), case.divergence
        exact = small.exact_gradient(log_p, f)
        assert abs(exact).max() > 1e-3  # comparing zeros would prove nothing
        slopes = np.exp(small.log_pi) * np.asarray(f.derivative(small.log_pi - log_p))
        np.testing.assert_allclose(np.einsum("s,spv->pv", slopes, small.scores), exact, atol=1e-10)
        for baseline in (0.0, 0.7):
            log_q = small.log_q if off_policy else None
            found = of_surrogate(small.params, log_p, log_q, jnp.asarray(baseline), divergence=f)
            np.testing.assert_allclose(found, exact, rtol=0, atol=1e-10)


@both_policies
@pytest.mark.parametrize(
    ("baseline", "samples"),
    [(0.7, 1), (3.0, 1), (surrogates.leave_one_out, 2), (surrogates.leave_one_out, 3)],
    ids=["constant", "another", "leave-one-out-of-2", "leave-one-out-of-3"],
)
def test_22_a_baseline_is_unbiased_whatever_the_weights(off_policy, baseline, samples, x64):
    """E[(w_i - ρ_i B_i) ∇log π] = E[w ∇log π] for any numbers w."""
    np.testing.assert_allclose(
        centred(baseline, samples, off_policy), plain(off_policy), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("samples", [2, 3])
def test_22_the_mean_that_includes_the_sample_shrinks_the_gradient(samples, x64):
    """By exactly (n - 1)/n: why the baseline leaves one out."""
    shrunk = (samples - 1) / samples * plain(False)
    np.testing.assert_allclose(centred(jnp.mean, samples, False), shrunk, rtol=0, atol=1e-10)


def weights():
    return jnp.asarray(np.random.default_rng(5).normal(scale=3, size=(10, 7)))


def centred(baseline, samples, off_policy):
    small = world()

    def loss(log_pi, weights, log_q):
        centred = surrogates.centred_weights(weights, log_pi, log_q, baseline=baseline)
        return centred * log_pi

    def of(weights):
        log_q = small.log_q if off_policy else None
        return enumeration.expected_gradient(loss, *small[:3], weights, log_q, samples=samples)

    return jax.jit(jax.vmap(of))(weights())


def plain(off_policy):
    small = world()
    drawn = np.exp(small.log_q if off_policy else small.log_pi)
    gradient = np.einsum("ws,s,spv->wpv", weights(), drawn, small.scores)
    assert abs(gradient).max() > 1e-3
    return gradient


@each_target_of_the_paper
@both_policies
@pytest.mark.parametrize("samples", [2, 3])
def test_22_the_two_together(case, hard, off_policy, samples, x64):
    """As a user writes it."""
    small = world()
    log_p, log_q = small.target(hard=hard), small.log_q if off_policy else None
    found = leave_one_out_of(
        small.params, log_p, log_q, divergence=case.divergence, samples=samples
    )
    exact = small.exact_gradient(log_p, case.divergence)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-10)


@functools.partial(jax.jit, static_argnames=("divergence", "samples"))
def leave_one_out_of(params, log_p, log_q, **options):
    return enumeration.expected_surrogate_gradient(
        LOG_PROB_FN, params, SPACE, log_p, log_q, baseline=surrogates.leave_one_out, **options
    )


def test_22_the_score_has_no_mean(x64):
    small = world(2)
    np.testing.assert_allclose(expected(lambda x, *_: x, small, small.log_p), 0, atol=1e-14)


@each
def test_23_a_baseline_without_its_ratio_is_biased_off_policy(case, x64):
    """Regression: subtracting B from (π/q) f' instead of from f' adds B·E_q[∇log π]
    (mathematics.md, 1.5)."""
    small, f = world(), case.divergence

    def unweighted(log_pi, log_p, log_q):
        weights = surrogates.score_weights(log_pi, log_p, log_q, divergence=f)
        return jax.lax.stop_gradient(weights - 0.7) * log_pi

    bias = expected(unweighted, small, small.log_p, small.log_q)
    bias = bias - small.exact_gradient(small.log_p, f)
    score = np.einsum("s,spv->pv", np.exp(small.log_q), small.scores)
    np.testing.assert_allclose(bias, -0.7 * score, atol=1e-10)
    assert abs(bias).max() > 0.05


@each_target
def test_23_samples_of_the_target_suffice_where_the_policy_has_its_support(case, hard, x64):
    """Forward KL needs q to cover p only; the others π too, or they get another gradient."""
    small, f = world(), case.divergence
    log_p = small.target(hard=hard)
    found = of_surrogate(small.params, log_p, log_p, jnp.asarray(0.0), divergence=f)
    error = abs(found - small.exact_gradient(log_p, f)).max()
    assert (error < 1e-10) == (not hard or f.name == "forward_kl")


def test_23_a_clip_out_of_reach_changes_nothing_and_one_within_biases(x64):
    small, kl = world(), divergences.forward_kl()
    wide, narrow = (
        jax.jit(functools.partial(
            enumeration.expected_surrogate_gradient, *small[:3], divergence=kl, clip=clip
        ))(small.log_p_hard) for clip in ((-1e9, 1e9), (-1.0, 1e9))
    )  # fmt: skip
    np.testing.assert_allclose(wide, small.exact_gradient(small.log_p_hard, kl), atol=1e-10)
    assert abs(narrow - wide).max() > 0.01


@each_target_of_the_paper
def test_27_the_monte_carlo_mean_is_within_five_standard_errors(case, hard, x64):
    """Of 20 000 samples off-policy; that it is so of every f follows from the sums above."""
    small, n = world(7), 20_000
    log_p = small.target(hard=hard)
    rows = jax.random.categorical(jax.random.key(0), small.log_q, shape=(n,))

    @jax.jit
    @jax.grad
    def gradient(log_pi):
        return surrogates.surrogate_loss(
            log_pi, log_p[rows], small.log_q[rows], divergence=case.divergence,
            baseline=surrogates.leave_one_out,
        ).sum()  # fmt: skip

    gradients = np.asarray(gradient(small.log_pi[rows]))[:, None, None] * small.scores[rows]
    error = gradients.std(axis=0) / np.sqrt(n)
    difference = abs(gradients.mean(axis=0) - small.exact_gradient(log_p, case.divergence))
    assert (difference <= 5 * error + 1e-14).all()
    assert (error > 0).any()
