"""Losses of the RLHF side on spaces that are summed whole; their guards and their refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration, policy_gradients
from tests.cases import refused, world


def rewards_of(small, log_pi, rewards):
    """The reward of a sample, found by its log-probability: what an enumerated loss is given."""
    return rewards[jnp.argmin(abs(log_pi[:, None] - small.log_pi[None]), axis=1)]


@pytest.mark.parametrize("kind", ["reinforce", "rloo"])
def test_the_gradient_of_the_mean_reward(kind, x64):
    small = world()
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=7))
    exact = jax.grad(lambda params: -jnp.exp(small.log_prob_fn(params, *small.space)) @ rewards)(small.params)

    def loss(log_pi, *_):
        r = rewards_of(small, log_pi, rewards)
        return policy_gradients.rloo(log_pi, r) if kind == "rloo" else policy_gradients.reinforce(log_pi, r, baseline=0.4)

    found = enumeration.expected_gradient(loss, *small[:3], small.log_p, samples=3 if kind == "rloo" else 1)
    np.testing.assert_allclose(found, exact, atol=1e-10)


def test_a_group_mean_shrinks_and_leaving_one_out_does_not(x64):
    small = world()
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=7))
    exact = jax.grad(lambda params: -jnp.exp(small.log_prob_fn(params, *small.space)) @ rewards)(small.params)

    def loss(log_pi, *_):
        advantages = policy_gradients.group_advantages(rewards_of(small, log_pi, rewards), scale=False)
        return -advantages * log_pi

    found = enumeration.expected_gradient(loss, *small[:3], small.log_p, samples=3)
    np.testing.assert_allclose(found, 2 / 3 * exact, atol=1e-10)


def test_kl_token_by_token_has_the_gradient_of_kl_of_sequences(x64):
    """And so has the sum of the ratios in front of the whole log-probability; only the former has the smaller variance."""
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 3)
    space = enumeration.sequences(3, 3, eos_id=0)
    rng = np.random.default_rng(0)
    params, base = (jnp.asarray(rng.normal(size=(prefixes, 3))) for _ in range(2))

    def by_token(params):
        """``[S, T]``, as differences of the log-probabilities of growing prefixes."""
        columns = jnp.arange(3)
        sums = [log_prob_fn(params, space.tokens, space.where & (columns[None] < i)) for i in range(4)]
        return jnp.stack([b - a for a, b in itertools.pairwise(sums)], axis=1)

    probability = jnp.exp(log_prob_fn(params, *space))
    scores = jax.jacobian(by_token)(params)
    weights = jax.grad(lambda x: policy_gradients.kl_reward_to_go(x, by_token(base), where=space.where).sum())(by_token(params))
    per_sample = jnp.einsum("st,stpv->spv", weights, scores)
    exact = enumeration.exact_gradient(
        log_prob_fn, params, space, log_prob_fn(base, *space), divergence=divergences.reverse_kl()
    )
    np.testing.assert_allclose(jnp.einsum("s,spv->pv", probability, per_sample), exact, atol=1e-10)
    whole = (by_token(params) - by_token(base)).sum(axis=1)[:, None, None] * scores.sum(axis=1)
    np.testing.assert_allclose(jnp.einsum("s,spv->pv", probability, whole), exact, atol=1e-10)
    variances = [jnp.einsum("s,spv->", probability, (x - exact[None]) ** 2) for x in (per_sample, whole)]
    assert variances[0] < variances[1]
    value = policy_gradients.kl_reward_to_go(by_token(params), by_token(base), where=space.where).sum(axis=1)
    kl = divergences.exact_divergence(jnp.log(probability), log_prob_fn(base, *space), divergence=divergences.reverse_kl())
    assert float(probability @ value) == pytest.approx(float(kl), rel=1e-10)


def test_the_penalty_per_token_is_the_divergence_of_next_tokens(x64):
    """At fixed prefixes: E over one next token is D_f of the two rows, value and gradient."""
    rng = np.random.default_rng(0)
    logits, log_a = jnp.asarray(rng.normal(size=(4, 5))), jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 5))))
    f = divergences.jensen_shannon()

    def expected(logits):
        log_pi = jax.nn.log_softmax(logits)
        return (jax.lax.stop_gradient(jnp.exp(log_pi)) * policy_gradients.divergence_penalty(log_pi, log_a, divergence=f)).sum()

    def exact(logits):
        each = jax.vmap(lambda x, y: divergences.exact_divergence(x, y, divergence=f))
        return each(jax.nn.log_softmax(logits), log_a).sum()

    assert float(expected(logits)) == pytest.approx(float(exact(logits)), rel=1e-10)
    np.testing.assert_allclose(jax.grad(expected)(logits), jax.grad(exact)(logits), atol=1e-10)


def test_estimators_have_no_gradient():
    for k in (policy_gradients.k1, policy_gradients.k2, policy_gradients.k3):
        assert jax.grad(lambda x, k=k: k(x, jnp.array([-2.0])).sum())(jnp.array([-1.0])).tolist() == [0]


def test_far_ratios_stay_finite():
    far = jnp.array([-1000.0, 0.0])
    assert np.isfinite(policy_gradients.k3(far, -far - 1000)).all()
    loss = policy_gradients.ppo_clip(jnp.array([0.0]), jnp.array([-1000.0]), jnp.array([-1.0]), dual_clip=3.0)
    assert loss.tolist() == [3.0]
    gradient = jax.grad(lambda x: policy_gradients.ppo_clip(x, x - 1000, jnp.array([-1.0])).sum())
    assert np.isfinite(gradient(jnp.array([0.0]))).all()


def test_refusals():
    two = jnp.zeros(2)
    with refused("dual_clip must be above 1, got 1.0"):
        policy_gradients.ppo_clip(two, two, two, dual_clip=1.0)
    with refused("total_variation has no inverse derivative"):
        policy_gradients.f_regularized_optimum(two, two, beta=1.0, divergence=divergences.total_variation())
    with refused("beta must be positive, got 0"):
        policy_gradients.f_regularized_optimum(two, two, beta=0.0, divergence=divergences.reverse_kl())
    with refused("at least 2 samples"):
        policy_gradients.rloo(jnp.zeros(1), jnp.zeros(1))
