"""Losses of the RLHF side on spaces that are summed whole; their guards and their refusals."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration, policy_gradients
from tests.cases import refused, with_inverse, world


def rewards_of(small, log_pi, rewards):
    """The reward of a sample, found by its log-probability: what an enumerated loss is given."""
    return rewards[jnp.argmin(abs(log_pi[:, None] - small.log_pi[None]), axis=1)]


@pytest.mark.parametrize("kind", ["reinforce", "rloo"])
def test_the_gradient_of_the_mean_reward(kind, x64):
    small = world()
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=7))
    exact = jax.grad(lambda params: -jnp.exp(small.log_prob_fn(params, *small.space)) @ rewards)(
        small.params
    )

    def loss(log_pi, *_):
        r = rewards_of(small, log_pi, rewards)
        return (
            policy_gradients.rloo(log_pi, r)
            if kind == "rloo"
            else policy_gradients.reinforce(log_pi, r, baseline=0.4)
        )

    found = enumeration.expected_gradient(
        loss, *small[:3], small.log_p, samples=3 if kind == "rloo" else 1
    )
    np.testing.assert_allclose(found, exact, atol=1e-10)


def test_a_group_mean_shrinks_and_leaving_one_out_does_not(x64):
    small = world()
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=7))
    exact = jax.grad(lambda params: -jnp.exp(small.log_prob_fn(params, *small.space)) @ rewards)(
        small.params
    )

    def loss(log_pi, *_):
        advantages = policy_gradients.group_advantages(
            rewards_of(small, log_pi, rewards), scale=False
        )
        return -advantages * log_pi

    found = enumeration.expected_gradient(loss, *small[:3], small.log_p, samples=3)
    np.testing.assert_allclose(found, 2 / 3 * exact, atol=1e-10)


def test_kl_token_by_token_has_the_gradient_of_kl_of_sequences(x64):
    """And so has the sum of the ratios in front of the whole log-probability; only the former has
    the smaller variance."""
    log_prob_fn, prefixes = enumeration.tabular_log_prob_fn(3, 3)
    space = enumeration.sequences(3, 3, eos_id=0)
    rng = np.random.default_rng(0)
    params, base = (jnp.asarray(rng.normal(size=(prefixes, 3))) for _ in range(2))

    def by_token(params):
        """``[S, T]``, as differences of the log-probabilities of growing prefixes."""
        columns = jnp.arange(3)
        sums = [
            log_prob_fn(params, space.tokens, space.where & (columns[None] < i)) for i in range(4)
        ]
        return jnp.stack([b - a for a, b in itertools.pairwise(sums)], axis=1)

    probability = jnp.exp(log_prob_fn(params, *space))
    scores = jax.jacobian(by_token)(params)
    weights = jax.grad(
        lambda x: policy_gradients.kl_reward_to_go(x, by_token(base), where=space.where).sum()
    )(by_token(params))
    per_sample = jnp.einsum("st,stpv->spv", weights, scores)
    exact = enumeration.exact_gradient(
        log_prob_fn, params, space, log_prob_fn(base, *space), divergence=divergences.reverse_kl()
    )
    np.testing.assert_allclose(jnp.einsum("s,spv->pv", probability, per_sample), exact, atol=1e-10)
    whole = (by_token(params) - by_token(base)).sum(axis=1)[:, None, None] * scores.sum(axis=1)
    np.testing.assert_allclose(jnp.einsum("s,spv->pv", probability, whole), exact, atol=1e-10)
    variances = [
        jnp.einsum("s,spv->", probability, (x - exact[None]) ** 2) for x in (per_sample, whole)
    ]
    assert variances[0] < variances[1]
    value = policy_gradients.kl_reward_to_go(
        by_token(params), by_token(base), where=space.where
    ).sum(axis=1)
    kl = divergences.exact_divergence(
        jnp.log(probability), log_prob_fn(base, *space), divergence=divergences.reverse_kl()
    )
    assert float(probability @ value) == pytest.approx(float(kl), rel=1e-10)


def test_the_penalty_per_token_is_the_divergence_of_next_tokens(x64):
    """At fixed prefixes: E over one next token is D_f of the two rows, value and gradient."""
    rng = np.random.default_rng(0)
    logits, log_a = (
        jnp.asarray(rng.normal(size=(4, 5))),
        jax.nn.log_softmax(jnp.asarray(rng.normal(size=(4, 5)))),
    )
    f = divergences.jensen_shannon()

    def expected(logits):
        log_pi = jax.nn.log_softmax(logits)
        return (
            jax.lax.stop_gradient(jnp.exp(log_pi))
            * policy_gradients.divergence_penalty(log_pi, log_a, divergence=f)
        ).sum()

    def exact(logits):
        each = jax.vmap(lambda x, y: divergences.exact_divergence(x, y, divergence=f))
        return each(jax.nn.log_softmax(logits), log_a).sum()

    assert float(expected(logits)) == pytest.approx(float(exact(logits)), rel=1e-10)
    np.testing.assert_allclose(jax.grad(expected)(logits), jax.grad(exact)(logits), atol=1e-10)


def test_estimators_have_no_gradient():
    for k in (policy_gradients.k1, policy_gradients.k2, policy_gradients.k3):
        assert jax.grad(lambda x, k=k: k(x, jnp.array([-2.0])).sum())(
            jnp.array([-1.0])
        ).tolist() == [0]


def test_far_ratios_stay_finite():
    far = jnp.array([-1000.0, 0.0])
    assert np.isfinite(policy_gradients.k3(far, -far - 1000)).all()
    loss = policy_gradients.ppo_clip(
        jnp.array([0.0]), jnp.array([-1000.0]), jnp.array([-1.0]), dual_clip=3.0
    )
    assert loss.tolist() == [3.0]
    gradient = jax.grad(lambda x: policy_gradients.ppo_clip(x, x - 1000, jnp.array([-1.0])).sum())
    assert np.isfinite(gradient(jnp.array([0.0]))).all()


ROUNDING = 100.1 + np.spacing(np.float32(100.1)) * np.array([0, 1, -1, 2, 0, 0, 1, 0] * 2)


@pytest.mark.parametrize(
    "rewards", [np.full(16, 100.1), np.full(16, 0.3), np.full(3, -1e6), ROUNDING], ids=range(4)
)
def test_equal_rewards_teach_nothing(rewards):
    """Regression: advantages of 0.13, which are noise of rounding in units of its own spread; 1e-3
    apart still teaches."""
    rewards = jnp.asarray(rewards, jnp.float32)
    log_pi, counted = jnp.linspace(-2.0, -1.0, rewards.size), jnp.ones((rewards.size, 2), bool)
    tokens = jnp.stack([log_pi, 2 * log_pi], axis=1)

    def losses(rewards):
        return [
            policy_gradients.group_advantages(rewards),
            policy_gradients.group_advantages(rewards, scale=False),
            policy_gradients.group_advantages(rewards, epsilon=0.0),
            policy_gradients.rloo(log_pi, rewards),
            policy_gradients.grpo(tokens, tokens, rewards, where=counted),
            policy_gradients.dr_grpo(tokens, tokens, rewards, where=counted, max_tokens=2),
            policy_gradients.gspo(tokens, tokens, rewards, where=counted),
        ]

    for loss in losses(rewards):
        assert (loss == 0).all()
    for loss in losses(rewards.at[0].multiply(1.001)):
        assert abs(loss).max() > 1e-4


def test_advantages_far_from_zero_are_those_near_it():
    """Differences are taken before means: the offset costs none of their digits."""
    near = jnp.array([0.0, 0.25, 0.5, 1.0])
    for function in (
        policy_gradients.group_advantages,
        lambda x: policy_gradients.rloo(jnp.ones(4), x),
    ):
        np.testing.assert_allclose(function(near + 4096.0), function(near), rtol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("junk", [-np.inf, np.inf, np.nan])
def test_a_padding_sequence_is_no_member_of_the_group(kind, junk):
    """Whatever its reward: the others' losses are those of the group without it, and its own is 0,
    as is its gradient."""
    options = {"max_tokens": 4} if kind == "dr_grpo" else {}
    loss = getattr(policy_gradients, kind)
    log_pi = jnp.array([[-1.0, -2.0], [-1.5, -0.5], [-1.0, -1.0]])
    rewards, where = (
        jnp.array([1.0, 0.0, 0.3]),
        jnp.array([[True, True], [True, False], [True, True]]),
    )
    padded = [
        jnp.append(x, jnp.full((1, *x.shape[1:]), junk), axis=0)
        for x in (log_pi, log_pi - 0.1, rewards)
    ]
    mask = jnp.append(where, jnp.zeros((1, 2), bool), axis=0)

    def total(x, others, mask):
        losses = loss(x, *others, where=mask, **options)
        return losses.sum(), losses

    (_, expected), slope = jax.value_and_grad(total, has_aux=True)(
        log_pi, (log_pi - 0.1, rewards), where
    )
    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(padded[0], padded[1:], mask)
    np.testing.assert_allclose(found, [*expected, 0], rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.append(slope, jnp.zeros((1, 2)), axis=0), rtol=1e-6)
    # nor is any, where nothing counts
    assert not loss(*padded, where=jnp.zeros((4, 2), int), **options).any()


def test_a_group_of_one_has_no_advantage():
    assert policy_gradients.group_advantages(jnp.array([3.0])).tolist() == [0]
    assert policy_gradients.group_advantages(
        jnp.array([3.0, jnp.nan]), where=jnp.array([1, 0])
    ).tolist() == [0, 0]


def test_a_penalty_where_the_base_has_no_mass_is_finite_with_f():
    """Regression: f'(1) was read off at 0·∞."""
    log_a = jnp.array([-jnp.inf, -1.0])

    def penalty(x):
        return policy_gradients.divergence_penalty(
            x, log_a, divergence=divergences.jensen_shannon()
        )

    log_pi = jnp.array([-1.0, -1.0])
    np.testing.assert_allclose(
        jax.grad(lambda x: penalty(x).sum())(log_pi), [np.log(2) / 2, 0], atol=1e-7
    )
    np.testing.assert_allclose(penalty(log_pi), [np.log(2) / 2, 0], atol=1e-7)


regularized_optimum = jax.jit(
    policy_gradients.f_regularized_optimum, static_argnames=("beta", "divergence")
)


@with_inverse
@pytest.mark.parametrize("spread", [3.0, 120.0, 1000.0])
def test_the_regularised_optimum_stays_in_log_space(case, spread, x64):
    """Where π > 0, r - β f'(π/a) is one number λ, however small or large π/a; where π = 0, r is
    below β f'(0) + λ."""
    log_a = jnp.array([np.log(0.5), np.log(0.3), np.log(0.2), -spread, -jnp.inf, -2 * spread])
    log_a = log_a - jax.nn.logsumexp(log_a)
    rewards, beta = jnp.array([0.0, -spread, 1.0, 0.7 * spread, 5.0, -jnp.inf]), 0.8
    log_pi = regularized_optimum(log_a, rewards, beta=beta, divergence=case.divergence)
    assert float(jnp.exp(log_pi).sum()) == pytest.approx(1, abs=1e-12)
    assert np.isneginf(log_pi[4:]).all()
    slopes = rewards[:4] - beta * case.divergence.derivative((log_pi - log_a)[:4])
    positive = ~np.isneginf(log_pi[:4])
    shift = slopes[np.argmax(log_pi)]
    np.testing.assert_allclose(slopes[positive], shift, atol=1e-7 * spread)
    lowest = float(case.divergence.derivative(-jnp.inf))
    assert (rewards[:4][~positive] <= beta * lowest + shift + 1e-9).all()
    assert positive.all() or np.isfinite(lowest)


def test_in_float32_the_optimum_under_reverse_kl_is_the_tilted_base():
    """Regression: -inf where it is -120."""
    log_a, rewards = jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -120.0])
    found = policy_gradients.f_regularized_optimum(
        log_a, rewards, beta=1.0, divergence=divergences.reverse_kl()
    )
    np.testing.assert_allclose(found, [0, -120], rtol=1e-6, atol=1e-6)
    rare = jnp.array([0.0, -130.0])  # and where the base hardly goes
    found = policy_gradients.f_regularized_optimum(
        rare, -rare, beta=1.0, divergence=divergences.reverse_kl()
    )
    np.testing.assert_allclose(found, np.log([0.5, 0.5]), atol=1e-4)


def test_groups_may_be_spread_over_devices():
    rng = np.random.default_rng(0)
    tokens, log_q, rewards = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 3), (8, 3), (8,))
    )
    where = jnp.asarray(rng.uniform(size=(8, 3)) < 0.7)

    def all_of_them(tokens, log_q, rewards, where, **o):
        return (
            policy_gradients.rloo(tokens[:, 0], rewards, **o),
            policy_gradients.group_advantages(rewards, where=where[:, 0], **o),
            policy_gradients.grpo(tokens, log_q, rewards, where=where, **o),
            policy_gradients.dr_grpo(tokens, log_q, rewards, max_tokens=3, where=where, **o),
            policy_gradients.gspo(tokens, log_q, rewards, where=where, **o),
            policy_gradients.trajectory_balance(tokens[:, 0], rewards, **o),
        )

    rows = jax.sharding.PartitionSpec("rows")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("rows",))
    spread = jax.shard_map(
        functools.partial(all_of_them, axis_name="rows"), mesh=mesh, in_specs=rows, out_specs=rows
    )
    arguments = (tokens, log_q, rewards, where)
    for whole, found in zip(all_of_them(*arguments), jax.jit(spread)(*arguments), strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_refusals():
    two = jnp.zeros(2)
    with refused("dual_clip must be above 1, got 1.0"):
        policy_gradients.ppo_clip(two, two, two, dual_clip=1.0)
    with refused("total_variation has no inverse derivative"):
        policy_gradients.f_regularized_optimum(
            two, two, beta=1.0, divergence=divergences.total_variation()
        )
    with refused("beta must be positive, got 0"):
        policy_gradients.f_regularized_optimum(
            two, two, beta=0.0, divergence=divergences.reverse_kl()
        )
    with refused("at least 2 samples"):
        policy_gradients.rloo(jnp.zeros(1), jnp.zeros(1))
