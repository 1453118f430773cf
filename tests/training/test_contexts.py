"""Conditional targets: one Z a context gives the mean of the contexts' exact gradients, one Z for
all another objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, forward_kl, jensen_shannon, reverse_kl, total_variation
from fjax.divergences import squared_hellinger
from fjax.estimators import log_mean_estimate
from fjax.training import Rollout, fdpg, rloo_tuner
from tests.cases import refused, world
from tests.training.test_rollout import make

DESCENT = optax.sgd(1.0)
LOG_Z = np.array([0.7, -2.0])  # an easy context and a hard one


def two_contexts(small, *, contexts=True, ids=(4, 1)):
    """Every sequence once for each of two targets, as if drawn uniformly, so that means are exact
    expectations."""
    log_p = jnp.stack([small.log_p, small.log_p_hard])
    tokens, where = (jnp.stack([x, x]) for x in small.space)
    log_q = jnp.full(log_p.shape, -np.log(log_p.shape[1]))
    return Rollout(
        tokens, where, log_q, log_p + LOG_Z[:, None], jnp.array(ids) if contexts else None
    )


def on_policy(rollout, small):
    """With scores of which none is -inf, for the tuners of reverse KL."""
    return rollout._replace(
        log_q=jnp.stack([small.log_pi] * 2), log_score=jnp.stack([small.log_p, small.log_q])
    )


def step(tuner, params, rollout):
    state, info = jax.jit(tuner.update)(tuner.init(params), rollout)
    return params - state.params, state, info


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("make", [forward_kl, jensen_shannon, total_variation])
def test_one_z_a_context_descends_the_mean_of_exact_gradients(make, microbatch_size, x64):
    small, divergence = world(), make()
    make_tuner = functools.partial(
        fdpg, small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0
    )
    moved, state, info = step(
        make_tuner(num_contexts=6, microbatch_size=microbatch_size),
        small.params,
        two_contexts(small),
    )
    exact = [
        enumeration.exact_gradient(*small[:3], p, divergence=divergence)
        for p in (small.log_p, small.log_p_hard)
    ]
    np.testing.assert_allclose(moved, (exact[0] + exact[1]) / 2, rtol=0, atol=1e-10)
    np.testing.assert_allclose(info.log_z.value, LOG_Z.mean(), atol=1e-10)
    found = jax.vmap(log_mean_estimate)(state.log_z).value
    np.testing.assert_allclose(
        found, [-np.inf, LOG_Z[1], -np.inf, -np.inf, LOG_Z[0], -np.inf], atol=1e-10
    )


def test_one_z_for_all_descends_another_objective(x64):
    """That of the joint target p(c, x) ∝ P_c(x), in which the easy context counts e^2.7 times as
    much as the hard one."""
    small, divergence = world(), squared_hellinger()
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
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0, num_contexts=6),
        small.params,
        two_contexts(small),
    )
    assert abs(moved - right).max() > 0.01


def test_baselines_are_of_one_context(x64):
    """Leave-one-out within each context: the mean of what each context alone would give."""
    small, divergence = world(), squared_hellinger()
    rollout = two_contexts(small)
    moved, _, _ = step(
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, num_contexts=6),
        small.params,
        rollout,
    )
    alone = [
        step(
            fdpg(small.log_prob_fn, DESCENT, divergence=divergence),
            small.params,
            Rollout(*(x[i] for x in rollout[:4])),
        )[0]
        for i in (0, 1)
    ]
    np.testing.assert_allclose(moved, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)


def test_a_context_without_a_hit_adds_nothing(x64):
    small, divergence = world(), squared_hellinger()
    rollout = two_contexts(small)
    rollout = rollout._replace(log_score=rollout.log_score.at[1].set(-jnp.inf))
    moved, state, info = step(
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0, num_contexts=6),
        small.params,
        rollout,
    )
    exact = enumeration.exact_gradient(*small[:3], small.log_p, divergence=divergence)
    np.testing.assert_allclose(moved, exact / 2, rtol=0, atol=1e-10)
    assert np.isfinite(info.divergence.value)
    assert np.isneginf(log_mean_estimate(jax.tree.map(lambda x: x[1], state.log_z)).value)


def test_z_of_a_context_is_a_mean_over_all_its_visits(x64):
    small = world()
    tuner = fdpg(
        small.log_prob_fn, optax.sgd(0.0), divergence=reverse_kl(), num_contexts=6, clip=(-9.0, 9.0)
    )
    state, rollout = tuner.init(small.params), two_contexts(small)
    state, _ = tuner.update(state, rollout)
    state, _ = tuner.update(
        state, rollout._replace(log_score=rollout.log_score + np.log(3), contexts=jnp.array([4, 2]))
    )
    found = np.exp(np.asarray(jax.vmap(log_mean_estimate)(state.log_z).value))
    easy, hard = np.exp(LOG_Z)
    np.testing.assert_allclose(found, [0, hard, 3 * hard, 0, 2 * easy, 0], atol=1e-10)


def test_rloo_has_contexts_too(x64):
    small = world()
    rollout = two_contexts(small)
    rollout = rollout._replace(
        log_score=jnp.stack([small.log_p, small.log_q]), log_q=jnp.stack([small.log_pi] * 2)
    )
    moved, _, _ = step(
        rloo_tuner(small.log_prob_fn, DESCENT, num_contexts=6), small.params, rollout
    )
    alone = [
        step(
            rloo_tuner(small.log_prob_fn, DESCENT),
            small.params,
            Rollout(*(x[i] for x in rollout[:4])),
        )[0]
        for i in (0, 1)
    ]
    np.testing.assert_allclose(moved, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["fdpg", "rloo", "ppo"])
def test_contexts_without_their_number_share_one_z(name, x64):
    """As the docstring says: the step of the same rollout that does not say which contexts they
    are."""
    small, tuner = world(), make(name)
    rollout = on_policy(two_contexts(small), small)
    (moved, state, info), (expected, expected_state, expected_info) = (
        step(tuner, small.params, r) for r in (rollout, rollout._replace(contexts=None))
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        (moved, state, info),
        (expected, expected_state, expected_info),
    )
    assert info.log_z.value.shape == ()


@pytest.mark.parametrize("outside", [-1, 6])
@pytest.mark.parametrize("name", ["fdpg", "rloo", "ppo"])
def test_a_context_that_does_not_exist_is_an_error_or_reported(name, outside):
    """-1 would be the last one, and 6 of 6 be clamped to it on reading and dropped on writing."""
    small, tuner = world(), make(name, num_contexts=6)
    rollout = on_policy(two_contexts(small, ids=[4, 1]), small)
    state, _ = jax.jit(tuner.update)(tuner.init(small.params), rollout)
    wrong = rollout._replace(contexts=jnp.array([4, outside]))
    with refused(rf"contexts must be from 0 to 5, for num_contexts=6; got \[.*{outside}.*\]"):
        tuner.update(state, wrong)
    after, info = jax.jit(tuner.update)(state, wrong)
    assert not info.finite
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), state._replace(step=0))


def test_rows_of_the_same_context_add_up(x64):
    """Two rows of one context are worth one of twice the length, in Z, in its count and in the
    gradient."""
    small = world()
    tuner = fdpg(
        small.log_prob_fn, DESCENT, divergence=squared_hellinger(), baseline=0.0, num_contexts=6
    )
    rollout = two_contexts(small, ids=[3, 3])
    moved, state, info = step(tuner, small.params, rollout)
    joined = Rollout(
        *(x.reshape(1, 14, *x.shape[2:]) for x in rollout[:4]), contexts=jnp.array([3])
    )
    expected, expected_state, expected_info = step(tuner, small.params, joined)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-12)
    found, right = (jax.vmap(log_mean_estimate)(s.log_z) for s in (state, expected_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, right)
    np.testing.assert_allclose(found.value[3], np.log(np.exp(LOG_Z).mean()), atol=1e-10)
    np.testing.assert_allclose(info.log_z.value, expected_info.log_z.value, atol=1e-12)


def test_strata_are_of_one_row(x64):
    """Four of the policy and three of the base model in each row: the mean of what each context
    alone would give."""
    small, divergence = world(), squared_hellinger()
    strata = jnp.array([[0, 0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0]])
    rollout = two_contexts(small)._replace(strata=strata)
    make_tuner = functools.partial(fdpg, small.log_prob_fn, DESCENT, divergence=divergence)
    moved, _, _ = step(make_tuner(num_contexts=6), small.params, rollout)
    alone = [
        step(make_tuner(), small.params, Rollout(*(x[i] for x in rollout[:4]), strata=strata[i]))[0]
        for i in (0, 1)
    ]
    np.testing.assert_allclose(moved, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-12)
    without, _, _ = step(make_tuner(num_contexts=6), small.params, rollout._replace(strata=None))
    assert abs(moved - without).max() > 1e-4


def test_figures_over_contexts_are_means_of_those_whose_z_is_known(x64):
    """With the standard error of that mean: their spread, n - 1, over √n."""
    small, divergence = world(), total_variation()
    rollout = jax.tree.map(lambda x: jnp.concatenate([x, x]), two_contexts(small))
    shifts = jnp.array([0.0, 1.0, 3.0, -jnp.inf])
    rollout = rollout._replace(
        contexts=jnp.array([0, 2, 5, 3]), log_score=rollout.log_score + shifts[:, None]
    )
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=divergence, num_contexts=6)
    _, _, info = step(tuner, small.params, rollout)
    log_z = np.array([0.7, -2.0 + 1.0, 0.7 + 3.0])
    np.testing.assert_allclose(info.log_z.value, log_z.mean(), atol=1e-10)
    np.testing.assert_allclose(info.log_z.std_error, log_z.std(ddof=1) / np.sqrt(3), atol=1e-10)
    easy, hard = (
        0.5 * np.abs(np.exp(small.log_pi) - np.exp(log_p)).sum()
        for log_p in (small.log_p, small.log_p_hard)
    )
    each = np.array([easy, hard, easy])
    np.testing.assert_allclose(info.divergence.value, each.mean(), atol=1e-10)
    np.testing.assert_allclose(info.divergence.std_error, each.std(ddof=1) / np.sqrt(3), atol=1e-10)


@pytest.mark.parametrize("name", ["fdpg", "rloo", "ppo"])
def test_misuse_is_refused(name):
    small = world()
    tuner = make(name, num_contexts=6)
    with refused("num_contexts=6 needs rollouts with one entry of contexts .* no contexts"):
        tuner.update(tuner.init(small.params), two_contexts(small, contexts=False))
    with refused(
        r"num_contexts=6 needs rollouts .* log_q of shape \[2, 7\] and contexts of shape \[3\]"
    ):
        tuner.update(tuner.init(small.params), two_contexts(small, ids=[0, 1, 2]))
    with refused("contexts must be integers, got float32"):
        tuner.update(tuner.init(small.params), two_contexts(small, ids=[0.0, 1.0]))
    with refused("The state is that of another tuner"):
        tuner.update(make(name).init(small.params), two_contexts(small))
