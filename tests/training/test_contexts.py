"""Conditional targets: one Z a context gives the mean of the contexts' exact gradients, one Z for all another objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, forward_kl, jensen_shannon, reverse_kl, total_variation
from fjax.estimators import log_mean_estimate
from fjax.training import Rollout, fdpg, rloo
from tests.cases import refused, world

DESCENT = optax.sgd(1.0)
LOG_Z = np.array([0.7, -2.0])  # an easy context and a hard one


def two_contexts(small, *, contexts=True):
    """Every sequence once for each of two targets, as if drawn uniformly, so that means are exact expectations."""
    log_p = jnp.stack([small.log_p, small.log_p_hard])
    tokens, where = (jnp.stack([x, x]) for x in small.space)
    log_q = jnp.full(log_p.shape, -np.log(log_p.shape[1]))
    return Rollout(tokens, where, log_q, log_p + LOG_Z[:, None], jnp.array([4, 1]) if contexts else None)


def step(tuner, params, rollout):
    state, info = jax.jit(tuner.update)(tuner.init(params), rollout)
    return params - state.params, state, info


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("make", [forward_kl, jensen_shannon, total_variation])
def test_one_z_a_context_descends_the_mean_of_exact_gradients(make, microbatch_size, x64):
    small, divergence = world(), make()
    make_tuner = functools.partial(fdpg, small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0)
    moved, state, info = step(make_tuner(num_contexts=6, microbatch_size=microbatch_size), small.params, two_contexts(small))
    exact = [enumeration.exact_gradient(*small[:3], p, divergence=divergence) for p in (small.log_p, small.log_p_hard)]
    np.testing.assert_allclose(moved, (exact[0] + exact[1]) / 2, rtol=0, atol=1e-10)
    np.testing.assert_allclose(info.log_z.value, LOG_Z.mean(), atol=1e-10)
    found = jax.vmap(log_mean_estimate)(state.log_z).value
    np.testing.assert_allclose(found, [-np.inf, LOG_Z[1], -np.inf, -np.inf, LOG_Z[0], -np.inf], atol=1e-10)


def test_one_z_for_all_descends_another_objective(x64):
    """That of the joint target p(c, x) ∝ P_c(x), in which the easy context counts e^2.7 times as much as the hard one."""
    small, divergence = world(), jensen_shannon()
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0)
    moved, _, info = step(tuner, small.params, two_contexts(small, contexts=False))
    log_z = np.log(np.exp(LOG_Z).mean())
    np.testing.assert_allclose(info.log_z.value, log_z, atol=1e-10)
    shifted = [p + z - log_z for p, z in zip((small.log_p, small.log_p_hard), LOG_Z, strict=True)]
    wrong = sum(
        jax.grad(
            lambda params, p=p: jnp.sum(
                jax.lax.stop_gradient(jnp.exp(small.log_pi) * divergence.derivative(small.log_pi - p))
                * small.log_prob_fn(params, *small.space)
            )
        )(small.params)
        for p in shifted
    )  # fmt: skip
    np.testing.assert_allclose(moved, wrong / 2, rtol=0, atol=1e-10)
    right, _, _ = step(
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0, num_contexts=6), small.params, two_contexts(small)
    )
    assert abs(moved - right).max() > 0.01


def test_baselines_are_of_one_context(x64):
    """Leave-one-out within each context: the mean of what each context alone would give."""
    small, divergence = world(), jensen_shannon()
    rollout = two_contexts(small)
    moved, _, _ = step(fdpg(small.log_prob_fn, DESCENT, divergence=divergence, num_contexts=6), small.params, rollout)
    alone = [
        step(fdpg(small.log_prob_fn, DESCENT, divergence=divergence), small.params, Rollout(*(x[i] for x in rollout[:4])))[0]
        for i in (0, 1)
    ]
    np.testing.assert_allclose(moved, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)


def test_a_context_without_a_hit_adds_nothing(x64):
    small, divergence = world(), jensen_shannon()
    rollout = two_contexts(small)
    rollout = rollout._replace(log_score=rollout.log_score.at[1].set(-jnp.inf))
    moved, state, info = step(
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0, num_contexts=6), small.params, rollout
    )
    exact = enumeration.exact_gradient(*small[:3], small.log_p, divergence=divergence)
    np.testing.assert_allclose(moved, exact / 2, rtol=0, atol=1e-10)
    assert np.isfinite(info.divergence.value)
    assert np.isneginf(log_mean_estimate(jax.tree.map(lambda x: x[1], state.log_z)).value)


def test_z_of_a_context_is_a_mean_over_all_its_visits(x64):
    small = world()
    tuner = fdpg(small.log_prob_fn, optax.sgd(0.0), divergence=reverse_kl(), num_contexts=6, clip=(-9.0, 9.0))
    state, rollout = tuner.init(small.params), two_contexts(small)
    state, _ = tuner.update(state, rollout)
    state, _ = tuner.update(state, rollout._replace(log_score=rollout.log_score + np.log(3), contexts=jnp.array([4, 2])))
    found = np.exp(np.asarray(jax.vmap(log_mean_estimate)(state.log_z).value))
    easy, hard = np.exp(LOG_Z)
    np.testing.assert_allclose(found, [0, hard, 3 * hard, 0, 2 * easy, 0], atol=1e-10)


def test_rloo_has_contexts_too(x64):
    small = world()
    rollout = two_contexts(small)
    rollout = rollout._replace(log_score=jnp.stack([small.log_p, small.log_q]), log_q=jnp.stack([small.log_pi] * 2))
    moved, _, _ = step(rloo(small.log_prob_fn, DESCENT, num_contexts=6), small.params, rollout)
    alone = [step(rloo(small.log_prob_fn, DESCENT), small.params, Rollout(*(x[i] for x in rollout[:4])))[0] for i in (0, 1)]
    np.testing.assert_allclose(moved, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)


def test_misuse_is_refused():
    small = world()
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=forward_kl(), num_contexts=6)
    with refused("num_contexts=6 needs rollouts with one entry of contexts .* no contexts"):
        tuner.update(tuner.init(small.params), two_contexts(small, contexts=False))
