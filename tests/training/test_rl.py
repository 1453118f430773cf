"""RLOO and PPO with the KL penalty in the reward: the gradient of reverse KL, exactly, and a trust
region around it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, leave_one_out, policy_gradients, reverse_kl, surrogate_loss
from fjax.training import Rollout, fdpg, ppo_tuner, rloo_tuner
from fjax.training.rl import _minibatches
from tests.cases import refused, world

DESCENT = optax.sgd(1.0)
BETA = 0.3


def samples(small, n=64, seed=0):
    """n draws of the policy itself, with a finite score."""
    rows = jax.random.categorical(jax.random.key(seed), small.log_pi, shape=(n,))
    tokens, where = (x[rows] for x in small.space)
    return Rollout(tokens, where, small.log_pi[rows], small.log_p[rows] + 0.7)


def token_log_prob_fn(params, tokens, where):
    """Of the tabular policy: what each further token adds to the log-probability of the prefix."""
    log_prob_fn = enumeration.tabular_log_prob_fn(3, 2)[0]
    upto = jnp.tril(jnp.ones((where.shape[1],) * 2, bool))[:, None] & where[None]
    prefixes = jax.vmap(lambda some: log_prob_fn(params, tokens, some))(upto).T
    return jnp.diff(prefixes, axis=1, prepend=0.0)


def step(tuner, params, rollout):
    state, info = jax.jit(tuner.update)(tuner.init(params), rollout)
    return params - state.params, info


def test_reinforce_with_k1_in_the_reward_and_the_reverse_kl_surrogate_have_one_expected_gradient(
    x64,
):
    """-∇(E[r] - β KL(π‖a)) = β ∇KL(π‖p) for p ∝ a·exp(r/β), for pairs of samples with
    leave-one-out, to 1e-10."""
    small = world()
    log_a, rewards = small.log_q, small.log_p  # any will do
    log_score = log_a + rewards / BETA
    log_p = log_score - jax.nn.logsumexp(log_score)
    everywhere = jnp.arange(7)

    def reinforce(log_pi, rows):
        reward = rewards[rows] - BETA * policy_gradients.k1(log_pi, log_a[rows])
        return policy_gradients.rloo(log_pi, reward)

    def surrogate(log_pi, rows):
        return surrogate_loss(log_pi, log_p[rows], divergence=reverse_kl(), baseline=leave_one_out)

    exact = enumeration.exact_gradient(*small[:3], log_p, divergence=reverse_kl())
    pairs = jnp.stack(jnp.meshgrid(everywhere, everywhere), axis=-1).reshape(-1, 2)
    weights = jnp.exp(small.log_pi[pairs].sum(1))
    for loss, factor in ((reinforce, BETA), (surrogate, 1.0)):

        def expected(params, loss=loss):
            log_pi = small.log_prob_fn(params, *small.space)
            return jnp.sum(weights * jax.vmap(lambda rows: loss(log_pi[rows], rows).mean())(pairs))

        np.testing.assert_allclose(
            jax.grad(expected)(small.params), factor * exact, rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_the_rloo_step_is_that_of_reverse_kl_on_the_policys_own_samples(microbatch_size, x64):
    """Sample for sample, whatever Z."""
    small = world()
    rollout = samples(small)
    moved, info = step(
        rloo_tuner(small.log_prob_fn, DESCENT, microbatch_size=microbatch_size),
        small.params,
        rollout,
    )
    expected, expected_info = step(
        fdpg(small.log_prob_fn, DESCENT, divergence=reverse_kl()), small.params, rollout
    )
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-12)
    assert abs(moved).max() > 1e-3
    np.testing.assert_allclose(info.divergence.value, expected_info.divergence.value)
    np.testing.assert_allclose(info.grad_norm, expected_info.grad_norm)


def test_the_first_ppo_step_has_the_direction_of_rloo(x64):
    small = world()
    rollout = samples(small)
    log_pi = token_log_prob_fn(small.params, rollout.tokens, rollout.where).sum(1)
    np.testing.assert_allclose(log_pi, rollout.log_q, atol=1e-12)
    moved, info = step(
        ppo_tuner(token_log_prob_fn, DESCENT, epochs=1, minibatches=1), small.params, rollout
    )
    expected, _ = step(rloo_tuner(small.log_prob_fn, DESCENT), small.params, rollout)
    cosine = (moved * expected).sum() / optax.tree.norm(moved) / optax.tree.norm(expected)
    np.testing.assert_allclose(cosine, 1, atol=1e-10)
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(moved), atol=1e-12)
    assert info.clipped_fraction == 0
    # In size, too: in units of the spread of R - B.
    rewards = rollout.log_score - log_pi
    spread = jnp.std(rewards - leave_one_out(rewards))
    np.testing.assert_allclose(moved * spread, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_samples_of_another_distribution_are_weighted(name, x64):
    """By the sum over the whole space, as if drawn uniformly: π/q·(R - B)∇log π."""
    small = world()
    rollout = Rollout(*small.space, jnp.full(7, -np.log(7)), small.log_p + 0.7)
    tuner = (
        rloo_tuner(small.log_prob_fn, DESCENT)
        if name == "rloo"
        else ppo_tuner(token_log_prob_fn, DESCENT, epochs=1, minibatches=1)
    )
    moved, info = step(tuner, small.params, rollout)
    advantages = (small.log_p - small.log_pi) - leave_one_out(small.log_p - small.log_pi)
    weights = -jnp.exp(small.log_pi) * advantages
    expected = jax.grad(lambda params: (weights * small.log_prob_fn(params, *small.space)).sum())(
        small.params
    )
    scale = 1.0 if name == "rloo" else jnp.std(7 * weights)
    np.testing.assert_allclose(moved * scale, expected, atol=1e-5)
    np.testing.assert_allclose(
        info.importance_ess, 1 / jnp.sum(jnp.exp(2 * small.log_pi)), rtol=1e-10
    )


@pytest.mark.parametrize("name", ["rloo", "ppo"])
@pytest.mark.parametrize("num_contexts", [None, 2])
def test_equal_rewards_move_nothing(name, num_contexts):
    """Adam would make full-size steps of rounding noise. R = 0.1 for all, but for rounding."""
    small = world()
    rollout = samples(small)
    # Two sums of the same tokens, in another order, differ by some units in the last place.
    units = (
        4
        * jnp.finfo(jnp.float32).eps
        * jax.random.rademacher(jax.random.key(1), (64,), jnp.float32)
    )
    rollout = rollout._replace(log_score=rollout.log_q * (1 + units) + 0.1)
    assert len(np.unique(rollout.log_score - rollout.log_q)) > 1
    optimizer = optax.adam(0.1)
    make = (
        functools.partial(rloo_tuner, small.log_prob_fn)
        if name == "rloo"
        else functools.partial(ppo_tuner, token_log_prob_fn)
    )
    tuner = make(optimizer, num_contexts=num_contexts)
    if num_contexts:
        rollout = jax.tree.map(lambda x: x.reshape(2, 32, *x.shape[1:]), rollout)
        rollout = rollout._replace(
            contexts=jnp.arange(2), log_score=rollout.log_score + jnp.array([[0.0], [5.0]])
        )
    moved, info = step(tuner, small.params, rollout)
    assert info.finite
    np.testing.assert_array_equal(moved, 0)
    # A real difference, be it of a thousandth, is seen.
    more = 1e-3 * (rollout.tokens == 1).any(-1)
    moved, _ = step(tuner, small.params, rollout._replace(log_score=rollout.log_score + more))
    assert abs(moved).max() > 0.01


def by_hand(deltas):
    """A table of log-probabilities, one a token, whatever the prefix; and an "optimiser" that adds
    a constant each time."""
    change = optax.GradientTransformation(
        lambda params: (), lambda grads, state, params=None: (jnp.asarray(deltas), state)
    )
    return lambda params, tokens, where: jnp.where(where, params[tokens], 0.0), change


@pytest.mark.parametrize(
    ("clip", "outside"),
    [
        ((0.2, 0.2), {0, 1}),
        ((0.1, 0.4), {1}),
        ((0.4, 0.1), {0}),
        ((0.4, 0.4), set()),
        ((2.0, 9.0), set()),
    ],
)
def test_the_clipped_fraction_counts_tokens_beyond_either_bound(clip, outside):
    """Token 0 becomes 1.35 times as probable, token 1 0.74 times, token 2 stays; seen by the second
    pass over the samples."""
    function, change = by_hand([0.3, -0.3, 0.01])
    tokens = jnp.array([[0, 0, 1, 2], [2, 1, 0, 0], [2, 2, 2, 1], [1, 0, 0, 0]])
    where = jnp.array([[1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]], bool)
    rollout = Rollout(tokens, where, jnp.zeros(4), jnp.array([0.0, 1.0, 2.0, 4.0]))
    _, info = step(
        ppo_tuner(function, change, epochs=2, minibatches=1, clip_ratio=clip), jnp.zeros(3), rollout
    )
    second = np.isin(tokens, list(outside)) & np.asarray(where)
    np.testing.assert_allclose(info.clipped_fraction, second.sum() / where.sum() / 2, rtol=1e-6)


@pytest.mark.parametrize("clip", [(0.05, 0.6), (0.6, 0.05), (0.2, 0.2)])
def test_the_second_pass_is_clipped_at_its_own_bounds(clip, x64):
    """Below by ε, above by ε', as the formula written out says; at these steps some ratios are
    beyond either."""
    small = world()
    rollout = samples(small)
    tuner = ppo_tuner(token_log_prob_fn, optax.sgd(2.0), epochs=2, minibatches=1, clip_ratio=clip)
    moved, info = step(tuner, small.params, rollout)
    assert info.clipped_fraction > 0
    old = token_log_prob_fn(small.params, rollout.tokens, rollout.where)
    rewards = rollout.log_score - old.sum(1)
    advantages = rewards - leave_one_out(rewards)
    advantages = (advantages / (jnp.std(advantages) + 1e-6))[:, None]

    def loss(params):
        ratio = jnp.exp(token_log_prob_fn(params, rollout.tokens, rollout.where) - old)
        bounded = jnp.clip(ratio, 1 - clip[0], 1 + clip[1])
        gain = jnp.where(rollout.where, jnp.minimum(ratio * advantages, bounded * advantages), 0.0)
        return -gain.sum(1).mean()

    params = small.params - 2 * jax.grad(loss)(small.params)
    expected = small.params - (params - 2 * jax.grad(loss)(params))
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-10)


def test_a_later_gradient_that_is_not_finite_takes_the_whole_update_back():
    """The first minibatch moves the parameter to 0, where the slope of its square root is
    infinite."""
    _, change = by_hand([-1.0, -1.0, -1.0])
    rollout = Rollout(
        jnp.array([[0], [1]]), jnp.ones((2, 1), bool), jnp.zeros(2), jnp.array([0.0, 1.0])
    )
    tuner = ppo_tuner(
        lambda params, tokens, where: jnp.sqrt(params)[tokens], change, epochs=2, minibatches=1
    )
    moved, info = step(tuner, jnp.ones(3), rollout)
    assert not info.finite
    np.testing.assert_array_equal(moved, 0)


def test_a_batch_without_tokens_has_no_clipped_fraction_of_nan():
    function, change = by_hand([0.0, 0.0, 0.0])
    rollout = Rollout(
        jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2), bool), jnp.zeros(2), jnp.array([0.0, 1.0])
    )
    _, info = step(ppo_tuner(function, change, minibatches=1), jnp.zeros(3), rollout)
    assert info.clipped_fraction == 0


@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_ppo_in_micro_batches_is_the_same(size, x64):
    """Four minibatches of 16 samples, two passes over them."""
    small = world()
    (whole, info), (parts, info_of_parts) = (
        step(
            ppo_tuner(token_log_prob_fn, optax.adam(0.1), microbatch_size=x),
            small.params,
            samples(small),
        )
        for x in (None, size)
    )
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), info_of_parts, info)


def test_ppo_never_holds_more_samples_than_a_micro_batch():
    sizes = set()

    def spy(params, tokens, where):
        sizes.add(tokens.shape[0])
        return token_log_prob_fn(params, tokens, where)

    tuner = ppo_tuner(spy, DESCENT, microbatch_size=8)
    jax.eval_shape(tuner.update, tuner.init(world().params), samples(world()))
    assert sizes == {8}


def test_minibatches_are_shuffled_anew_each_epoch_and_each_step():
    """Every sample once an epoch, in another order each time; the same again for the same step, as
    after a resume."""
    epochs = [np.asarray(_minibatches(jnp.array(s), 12, 2, 3)).reshape(2, 12) for s in (0, 1, 0)]
    orders = [tuple(order) for order in np.concatenate(epochs[:2])] + [tuple(range(12))]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) == 5
    np.testing.assert_array_equal(epochs[0], epochs[2])
    assert _minibatches(jnp.array(0), 12, 2, 3).shape == (6, 4)


def test_the_bounds_of_ppo_may_be_annealed():
    """A traced clip: one program for all of them, and the same step as with numbers."""
    small = world()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def moved(low, high):
        tuner = ppo_tuner(token_log_prob_fn, optax.sgd(0.5), epochs=3, clip_ratio=(low, high))
        return tuner.update(tuner.init(small.params), samples(small))[0].params

    for clip in ((0.05, 0.1), (0.3, 0.2)):
        expected = step(
            ppo_tuner(token_log_prob_fn, optax.sgd(0.5), epochs=3, clip_ratio=clip),
            small.params,
            samples(small),
        )[0]
        np.testing.assert_allclose(small.params - moved(*clip), expected, atol=1e-6)


@pytest.mark.parametrize("rubbish", [jnp.nan, -jnp.inf, 1e30])
def test_what_stands_at_tokens_not_counted_does_not_matter_to_ppo(rubbish):
    small = world()

    def careless(params, tokens, where):
        return jnp.where(where, token_log_prob_fn(params, tokens, where), rubbish)

    (moved, info), (expected, _) = (
        step(ppo_tuner(function, DESCENT, minibatches=2), small.params, samples(small))
        for function in (careless, token_log_prob_fn)
    )
    assert info.finite
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_ppo_stays_in_its_trust_region(x64):
    """With ever more passes over one batch the ratios of tokens stop at the clip, where plain
    REINFORCE runs away."""
    small = world()
    rollout = samples(small, n=256)

    def furthest(clip):
        tuner = ppo_tuner(
            token_log_prob_fn, optax.sgd(0.02), epochs=200, minibatches=1, clip_ratio=(clip, clip)
        )
        moved, info = step(tuner, small.params, rollout)
        old, new = (
            token_log_prob_fn(p, *small.space) for p in (small.params, small.params - moved)
        )
        return float(abs(new - old).max()), float(info.clipped_fraction)

    (held, clipped), (free, never) = furthest(0.2), furthest(1e6)
    # Not at log 1.2: probabilities that are not clipped themselves move with those that are pushed.
    assert held < 1.0
    assert free > 2 * held
    assert clipped > 0.1
    assert never == 0


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_training_comes_near_the_target(name):
    """On fresh samples of the policy: stochastic, seeded; KL(π‖p) falls to a fifth of its start."""
    small = world()
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 300))
    fewer = optax.adam(optax.cosine_decay_schedule(0.05, 300 * 4))
    tuner = (
        rloo_tuner(small.log_prob_fn, optimizer)
        if name == "rloo"
        else ppo_tuner(token_log_prob_fn, fewer, epochs=2, minibatches=2)
    )

    def one(state, seed):
        log_pi = small.log_prob_fn(state.params, *small.space)
        rows = jax.random.categorical(jax.random.key(seed), log_pi, shape=(64,))
        tokens, where = (x[rows] for x in small.space)
        return tuner.update(state, Rollout(tokens, where, log_pi[rows], small.log_p[rows]))

    state, _ = jax.lax.scan(one, tuner.init(small.params.astype(jnp.float32)), jnp.arange(300))
    kl = [
        jnp.sum(jnp.exp(x) * (x - small.log_p))
        for x in (small.log_pi, small.log_prob_fn(state.params, *small.space))
    ]
    assert kl[1] < 0.2 * kl[0]


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_a_score_of_minus_infinity_is_reported_and_changes_nothing_but_the_step(name):
    small = world()
    tuner = (
        rloo_tuner(small.log_prob_fn, DESCENT)
        if name == "rloo"
        else ppo_tuner(token_log_prob_fn, DESCENT)
    )
    state = tuner.init(small.params)
    rollout = samples(small)
    after, info = jax.jit(tuner.update)(
        state, rollout._replace(log_score=rollout.log_score.at[3].set(-jnp.inf))
    )
    assert not info.finite
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), state._replace(step=0))


def test_no_recompilation():
    small = world()
    tuner = ppo_tuner(token_log_prob_fn, optax.adam(1e-2))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tuner.update, n=1), donate_argnums=0)
    state = tuner.init(small.params)
    for seed in range(3):
        state, _ = update(state, samples(small, seed=seed))
    assert int(state.step) == 3


def test_misuse_is_refused():
    small = world()
    with refused("epochs must be at least 1, a whole number; got 0"):
        ppo_tuner(token_log_prob_fn, DESCENT, epochs=0)
    with refused("64 samples cannot be divided into 5 minibatches"):
        tuner = ppo_tuner(token_log_prob_fn, DESCENT, minibatches=5)
        tuner.update(tuner.init(small.params), samples(small))
    with refused("microbatch_size must be at least 1"):
        rloo_tuner(small.log_prob_fn, DESCENT, microbatch_size=0)
