"""The offline tuner descends the mean loss, and DPO's optimum is the target of RL with a KL
penalty."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, forward_kl, preferences
from fjax.training import Checkpoints, PairBatch, preference_tuner
from tests.cases import refused, world

DESCENT = optax.sgd(1.0)
LOSSES = {
    "dpo": partial(preferences.dpo, beta=0.3),
    "f_dpo": partial(preferences.f_dpo, beta=0.3, divergence=forward_kl()),
    "chi_po": partial(preferences.chi_po, beta=0.3),
    "ipo": partial(preferences.ipo, beta=0.3),
    "exo_pair": partial(preferences.exo_pair, beta=0.3),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def all_pairs(small):
    """Every ordered pair of different sequences, the policy of the world being the base model."""
    chosen, rejected = np.nonzero(~np.eye(7, dtype=bool))
    tokens, where = small.space
    pairs = PairBatch(
        tokens[chosen],
        where[chosen],
        tokens[rejected],
        where[rejected],
        small.log_pi[chosen],
        small.log_pi[rejected],
    )
    return pairs, chosen, rejected


def some_pairs(small):
    return jax.tree.map(lambda x: x[::5], all_pairs(small)[0])


def moved(small, seed=1):
    """Parameters of another policy."""
    return small.params + jnp.asarray(np.random.default_rng(seed).normal(size=small.params.shape))


@each_loss
def test_one_step_descends_the_mean_loss(loss, x64):
    small = world()
    params, pairs = moved(small), some_pairs(small)

    def mean_loss(params):
        chosen = small.log_prob_fn(params, pairs.chosen_tokens, pairs.chosen_where)
        rejected = small.log_prob_fn(params, pairs.rejected_tokens, pairs.rejected_where)
        return loss(chosen, rejected, pairs.chosen_log_a, pairs.rejected_log_a).mean()

    tuner = preference_tuner(small.log_prob_fn, DESCENT, loss=loss)
    state, info = jax.jit(tuner.update)(tuner.init(params), pairs)
    expected = jax.grad(mean_loss)(params)
    assert abs(expected).max() > 1e-3
    np.testing.assert_allclose(params - state.params, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(info.loss, mean_loss(params), rtol=1e-12)
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(expected), rtol=1e-12)


@pytest.mark.parametrize("size", [2, 5])
def test_micro_batches_change_nothing(size, x64):
    small = world()
    make = partial(preference_tuner, small.log_prob_fn, DESCENT, loss=LOSSES["dpo"])
    (whole, info), (parts, info_of_parts) = (
        jax.jit(tuner.update)(tuner.init(moved(small)), some_pairs(small))
        for tuner in (make(), make(microbatch_size=size))
    )
    np.testing.assert_allclose(parts.params, whole.params, rtol=0, atol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), info_of_parts, info)


def bradley_terry(small, beta, rewards):
    """DPO on all pairs, each weighted with the probability that people who have these rewards
    choose so."""
    pairs, chosen, rejected = all_pairs(small)
    probability = jax.nn.sigmoid(rewards[chosen] - rewards[rejected])

    def loss(*log_probs):
        return probability * preferences.dpo(*log_probs, beta=beta)

    return preference_tuner(small.log_prob_fn, DESCENT, loss=loss), pairs


def test_the_optimum_of_dpo_is_the_target_of_rl_with_a_kl_penalty(x64):
    """p ∝ a·exp(r/β) from exact Bradley–Terry preferences: the gradient vanishes there, and descent
    from a ends there."""
    small, beta = world(), 0.7
    rewards = jnp.asarray(np.random.default_rng(2).normal(size=7))
    log_p = jax.nn.log_softmax(small.log_pi + rewards / beta)
    optimum = enumeration.factorize(log_p, small.space, vocab_size=3)
    tuner, pairs = bradley_terry(small, beta, rewards)
    _, at_optimum = jax.jit(tuner.update)(tuner.init(optimum), pairs)
    assert at_optimum.grad_norm < 1e-8
    start = tuner.init(small.params)
    end, infos = jax.lax.scan(lambda state, _: tuner.update(state, pairs), start, length=2000)
    assert infos.grad_norm[0] > 1e-2
    assert (np.diff(infos.loss) <= 1e-15).all()
    np.testing.assert_allclose(infos.loss[-1], at_optimum.loss, atol=1e-10)
    np.testing.assert_allclose(small.log_prob_fn(end.params, *small.space), log_p, atol=1e-4)


def test_the_figures_are_of_the_policy_before_the_step(x64):
    small = world()
    pairs, chosen, rejected = all_pairs(small)
    tuner = preference_tuner(small.log_prob_fn, DESCENT, loss=LOSSES["dpo"])
    update = jax.jit(tuner.update)
    _, info = update(tuner.init(moved(small)), pairs)
    log_ratio = np.asarray(small.log_prob_fn(moved(small), *small.space) - small.log_pi)
    margins = log_ratio[chosen] - log_ratio[rejected]
    np.testing.assert_allclose(info.accuracy, 0.5)  # each pair is there in both orders
    np.testing.assert_allclose(info.margin, 0, atol=1e-12)
    some = margins > 0.5
    _, info = update(tuner.init(moved(small)), jax.tree.map(lambda x: x[some], pairs))
    np.testing.assert_allclose(info.accuracy, 1)
    np.testing.assert_allclose(info.margin, margins[some].mean())
    np.testing.assert_allclose(info.chosen_log_ratio, log_ratio[chosen][some].mean())
    np.testing.assert_allclose(info.rejected_log_ratio, log_ratio[rejected][some].mean())


@pytest.mark.parametrize("broken", [{"chosen_log_a": jnp.nan}, {"rejected_log_a": -jnp.inf}])
def test_a_broken_pair_is_reported_and_changes_nothing_but_the_step(broken):
    small = world()
    ((name, value),) = broken.items()
    pairs = some_pairs(small)
    tuner = preference_tuner(small.log_prob_fn, optax.adam(0.1), loss=LOSSES["dpo"])
    update = jax.jit(tuner.update)
    state, info = update(tuner.init(small.params), pairs)
    assert info.finite
    after, info = update(state, pairs._replace(**{name: getattr(pairs, name).at[1].set(value)}))
    assert not info.finite
    assert int(after.step) == 2
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), state._replace(step=0))


def test_the_state_is_saved_and_one_program_serves_all_steps(tmp_path):
    small = world()
    tuner = preference_tuner(small.log_prob_fn, optax.adam(0.1), loss=LOSSES["dpo"])
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tuner.update, n=1), donate_argnums=0)
    state = tuner.init(small.params)
    for _ in range(2):
        state, _ = update(state, some_pairs(small))
    assert np.isfinite(small.params).all()  # not donated with the state
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(tuner.init(small.params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored.log_z == ()


def test_a_micro_batch_has_at_least_one_answer():
    with refused("microbatch_size must be at least 1"):
        preference_tuner(world().log_prob_fn, DESCENT, loss=LOSSES["dpo"], microbatch_size=0)
