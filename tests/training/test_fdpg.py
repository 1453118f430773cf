"""The tuner's gradient is the exact one, whole or in parts; and nothing is lost when a batch says
nothing or too much."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import enumeration, forward_kl, jensen_shannon, reverse_kl, surrogates, total_variation
from fjax.divergences import squared_hellinger
from fjax.estimators import Estimate, RunningLogMean, log_mixture
from fjax.training import Rollout, fdpg, rloo_tuner
from tests.cases import CASES, each, each_target, name, refused, world

DESCENT = optax.sgd(1.0)


def everything(small, log_p, *, log_z=0.7):
    """Every sequence once, as if drawn uniformly: then a mean over the batch is the exact
    expectation, Z included."""
    size = small.space.tokens.shape[0]
    return Rollout(*small.space, jnp.full(size, -np.log(size)), log_p + log_z)


def gradient(tuner, params, rollout):
    state, info = jax.jit(tuner.update)(tuner.init(params), rollout)
    return params - state.params, info


@functools.partial(jax.jit, static_argnames="divergence")
def one_step(params, log_p, *, divergence):
    small = world()
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=divergence, baseline=0.0)
    return gradient(tuner, params, everything(small, log_p))


@each_target
def test_one_step_descends_the_exact_gradient(case, hard, x64):
    """With Z unknown to it, off-policy, in float64 to 1e-10."""
    small = world()
    log_p = small.target(hard=hard)
    moved, info = one_step(small.params, log_p, divergence=case.divergence)
    exact = small.exact_gradient(log_p, case.divergence)
    assert abs(exact).max() > 1e-3
    np.testing.assert_allclose(moved, exact, rtol=0, atol=1e-10)
    np.testing.assert_allclose(info.log_z.value, 0.7, atol=1e-10)
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(exact), atol=1e-10)
    assert info.finite


@pytest.mark.parametrize("size", [2, 3, 6, 7, 100])
@pytest.mark.parametrize("on_policy", [False, True])
def test_micro_batches_change_nothing(size, on_policy, x64):
    """Leave-one-out over all samples, and parts that do not divide them."""
    small = world()
    rollout = everything(small, small.log_p_hard)
    rollout = rollout._replace(log_q=small.log_pi) if on_policy else rollout
    make = functools.partial(
        fdpg, small.log_prob_fn, DESCENT, divergence=squared_hellinger(), on_policy=on_policy
    )
    whole, info = gradient(make(), small.params, rollout)
    parts, info_of_parts = gradient(make(microbatch_size=size), small.params, rollout)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), info_of_parts, info)


def test_on_policy_trusts_the_sampler(x64):
    small = world()
    rollout = everything(small, small.log_p)._replace(log_q=small.log_pi)
    make = functools.partial(fdpg, small.log_prob_fn, DESCENT, divergence=forward_kl())
    np.testing.assert_allclose(
        gradient(make(on_policy=True), small.params, rollout)[0],
        gradient(make(), small.params, rollout)[0],
        atol=1e-12,
    )


def test_one_forward_pass_a_step():
    """log π is scored once; in micro-batches once more, and on-policy not even that."""
    small = world()
    rollout = everything(small, small.log_p)
    calls = []

    def spy(params, tokens, where):
        calls.append(tokens.shape[0])
        return small.log_prob_fn(params, tokens, where)

    for options, expected in [
        ({}, [7]),
        ({"microbatch_size": 4}, [4, 4]),
        ({"microbatch_size": 4, "on_policy": True}, [4]),
    ]:
        tuner = fdpg(spy, DESCENT, divergence=forward_kl(), **options)
        calls.clear()
        jax.eval_shape(tuner.update, tuner.init(small.params), rollout)
        assert calls == expected


def test_no_recompilation():
    small = world()
    tuner = fdpg(small.log_prob_fn, optax.adam(1e-2), divergence=jensen_shannon())
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tuner.update, n=1), donate_argnums=0)
    state = tuner.init(small.params)
    for shift in range(4):
        state, _ = update(state, everything(small, small.log_p, log_z=float(shift)))
    assert int(state.step) == 4


def test_donating_the_state_leaves_the_base_model_alone():
    small = world()
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=forward_kl())
    jax.jit(tuner.update, donate_argnums=0)(
        tuner.init(small.params), everything(small, small.log_p)
    )
    assert np.isfinite(small.params).all()


def test_without_a_hit_nothing_moves_and_nothing_is_nan():
    """Z = 0 so far. The next batch has hits, and counts the misses in Z."""
    small = world()
    tuner = fdpg(small.log_prob_fn, optax.adam(0.1), divergence=jensen_shannon())
    nothing = everything(small, jnp.full(7, -jnp.inf))
    state, info = jax.jit(tuner.update)(tuner.init(small.params), nothing)
    np.testing.assert_array_equal(state.params, small.params)
    assert info.finite
    assert info.log_z.value == -np.inf
    assert np.isnan(info.divergence.value)  # unknown, and said to be
    assert np.isinf(info.divergence.std_error)
    state, info = jax.jit(tuner.update)(state, everything(small, small.log_p_hard, log_z=0.0))
    assert info.finite
    assert np.isfinite(state.params).all()
    assert abs(state.params - small.params).max() > 1e-3
    # 7 samples of mean 0, 7 of mean 1
    np.testing.assert_allclose(info.log_z.value, -np.log(2), atol=1e-5)


@pytest.mark.parametrize("kind", ["infinite divergence", "broken score"])
def test_a_non_finite_gradient_is_reported_and_changes_nothing_but_the_step(kind):
    small = world()
    tuner = fdpg(small.log_prob_fn, optax.adam(0.1), divergence=reverse_kl())
    state, _ = tuner.update(tuner.init(small.params), everything(small, small.log_p))
    bad = everything(
        small, small.log_p_hard if kind == "infinite divergence" else small.log_p.at[2].set(jnp.nan)
    )
    after, info = jax.jit(tuner.update)(state, bad)
    assert not info.finite
    assert int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, after._replace(step=0), state._replace(step=0))


def test_clipping_makes_reverse_kl_finite_and_is_counted():
    small = world()
    clip = (-1.0, 2.0)
    tuner = fdpg(small.log_prob_fn, DESCENT, divergence=reverse_kl(), clip=clip)
    rollout = everything(small, small.log_p_hard, log_z=0.0)
    _, info = gradient(tuner, small.params, rollout)
    unclipped = small.log_pi - small.log_p_hard + 1
    assert info.finite
    np.testing.assert_allclose(
        info.clipped_fraction, np.mean((unclipped < clip[0]) | (unclipped > clip[1])), atol=1e-6
    )
    np.testing.assert_allclose(info.reward_mean, -np.clip(unclipped, *clip).mean(), atol=1e-5)


@each
def test_training_reaches_the_target(case, x64):
    """A tabular policy can be p itself; each step sees the whole space.

    Without a baseline: leaving one out supposes independent draws, and here every sequence occurs
    exactly once.
    """
    small = world()
    # χ² falls from infinity: its first gradients are of another order than all later ones.
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(optax.cosine_decay_schedule(0.1, 400))
    )
    tuner = fdpg(small.log_prob_fn, optimizer, divergence=case.divergence, baseline=0.0)
    state = tuner.init(small.params)
    rollout = everything(small, small.log_p)
    state, info = jax.lax.scan(lambda state, _: tuner.update(state, rollout), state, length=400)
    assert info.divergence.value[0] > 0.01
    assert abs(info.divergence.value[-1]) < 0.02 * info.divergence.value[0]
    np.testing.assert_allclose(
        small.log_prob_fn(state.params, *small.space), small.log_p, atol=2e-2
    )


def known_z():
    """log Z = 0, for log_score = log p: what is left is the gradient's own bias."""
    zero = jnp.zeros(())
    return RunningLogMean(
        lambda: zero, lambda state, _: state, lambda state: Estimate(state, zero, zero)
    )


def expected_step(n, m, divergence, *, hard, with_strata, make=fdpg):
    """The tuner's mean gradient over every batch of n samples of the policy and m of a base model,
    and the exact one."""
    space = enumeration.sequences(3, 1, eos_id=0)
    log_prob_fn, _ = enumeration.tabular_log_prob_fn(3, 1)
    params = jnp.array([[0.5, -0.2, 0.1]])
    log_pi, log_a = log_prob_fn(params, *space), jnp.log(jnp.array([0.2, 0.1, 0.7]))
    log_p = jnp.log(jnp.array([0.0 if hard else 0.3, 0.5, 0.5 if hard else 0.2]))
    rows = jnp.asarray(list(itertools.product(range(3), repeat=n + m)))
    strata = jnp.array([0] * n + [1] * m)
    weights = jnp.exp(jnp.where(strata == 0, log_pi[rows], log_a[rows]).sum(1))
    log_q = log_mixture(log_pi, log_a, base_fraction=m / (n + m))
    options = {} if divergence is None else {"divergence": divergence}
    tuner = make(log_prob_fn, DESCENT, log_z=known_z(), **options)

    def gradient(rows):
        batch = Rollout(
            space.tokens[rows],
            space.where[rows],
            log_q[rows],
            log_p[rows],
            None,
            strata if with_strata else None,
        )
        return params - tuner.update(tuner.init(params), batch)[0].params

    @jax.jit
    def both(rows):
        exact = enumeration.exact_gradient(
            log_prob_fn, params, space, log_p, divergence=divergence or reverse_kl()
        )
        return jnp.tensordot(weights, jax.vmap(gradient)(rows), 1), exact

    return both(rows)


# The four of the paper: that every f has its exact step is shown above, and that what is left out of
# a stratum leaves every f's gradient unbiased in tests/test_surrogates.py. Here the two meet.
BATCHES = [(n, m, case) for n, m in [(2, 1), (4, 1), (2, 2)] for case in CASES[:4]]


@pytest.mark.parametrize(
    ("n", "m", "case"), BATCHES, ids=[f"{n}-{m}-{name(case)}" for n, m, case in BATCHES]
)
def test_the_expected_step_on_a_stratified_batch_is_exact(n, m, case, x64):
    """n samples of the policy and m of the base model, always so many: what a run with a defensive
    share has in each batch."""
    found, exact = expected_step(n, m, case.divergence, hard=case.allows_zeros, with_strata=True)
    assert abs(exact).max() > 1e-3
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [total_variation, jensen_shannon])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (4, 1), (2, 2)])
def test_without_strata_it_is_biased(n, m, make, x64):
    found, exact = expected_step(n, m, make(), hard=True, with_strata=False)
    assert abs(found - exact).max() > 1e-3 * abs(exact).max()


@pytest.mark.parametrize(("n", "m"), [(3, 0), (2, 1), (2, 2)])
def test_the_expected_rloo_step_is_exact_whatever_the_samples_are_from(n, m, x64):
    found, exact = expected_step(n, m, None, hard=False, with_strata=True, make=rloo_tuner)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)


def test_the_figures_of_a_step_by_hand(x64):
    """Each against its formula in NumPy, on four samples off-policy, one of them ruled out."""
    small, divergence, clip = world(), jensen_shannon(), (-0.5, 0.3)
    rows = np.array([1, 3, 4, 6])
    log_q, log_score = np.log([0.1, 0.3, 0.2, 0.25]), np.append(np.log([0.2, 0.05, 0.5]), -np.inf)
    rollout = Rollout(*(x[rows] for x in small.space), jnp.asarray(log_q), jnp.asarray(log_score))
    _, info = gradient(
        fdpg(small.log_prob_fn, DESCENT, divergence=divergence, clip=clip), small.params, rollout
    )
    log_pi = np.asarray(small.log_pi)[rows]
    ratio = np.exp(log_score - log_q)  # P/q
    z, rho = ratio.mean(), np.exp(log_pi - log_q)
    np.testing.assert_allclose(info.log_z.value, np.log(z))
    np.testing.assert_allclose(info.log_z.std_error, ratio.std(ddof=1) / 2 / z)
    np.testing.assert_allclose(info.log_z.ess, ratio.sum() ** 2 / (ratio**2).sum())
    np.testing.assert_allclose(info.importance_ess, rho.sum() ** 2 / (rho**2).sum())
    t = np.exp(log_pi) / np.maximum(np.exp(log_score) / z, 1e-300)
    free = 0.5 * np.log(2 * t / (1 + t))  # f' of Jensen–Shannon
    slope = np.clip(free, *clip)
    np.testing.assert_allclose(info.clipped_fraction, (free != slope).mean())
    assert 0 < (free < clip[0]).sum() < 4
    assert 0 < (free > clip[1]).sum() < 4
    np.testing.assert_allclose(info.reward_mean, -slope.mean())
    np.testing.assert_allclose(info.reward_std, slope.std())
    terms = rho * 0.5 * (np.log(2 * t / (1 + t)) + np.log(2 / (1 + t)) / t)  # (π/q) f(t)/t
    np.testing.assert_allclose(info.divergence.value, terms.mean())
    np.testing.assert_allclose(info.divergence.std_error, terms.std(ddof=1) / 2)
    weights = rho * slope
    weights = (weights - rho * (weights.sum() - weights) / 3) / 4
    np.testing.assert_allclose(info.loss, (weights * log_pi).sum())


def test_the_bounds_of_f_may_be_annealed_and_all_of_it_compiled():
    """A traced clip, and parameters that are traced when the state is made: one program, the same
    figures as with numbers."""
    small = world()
    rollout = everything(small, small.log_p, log_z=0.0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def clipped(params, low, high):
        tuner = fdpg(small.log_prob_fn, DESCENT, divergence=reverse_kl(), clip=(low, high))
        state, info = tuner.update(tuner.init(params), rollout)
        return params - state.params, info

    for clip in ((-0.5, 0.5), (-1.0, 2.0)):
        found, expected = (
            clipped(small.params, *clip),
            gradient(
                fdpg(small.log_prob_fn, DESCENT, divergence=reverse_kl(), clip=clip),
                small.params,
                rollout,
            ),
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
        assert found[1].clipped_fraction > 0


def test_misuse_is_refused():
    small = world()
    with refused("microbatch_size must be at least 1"):
        fdpg(small.log_prob_fn, DESCENT, divergence=forward_kl(), microbatch_size=0)
    tuner = fdpg(
        small.log_prob_fn, DESCENT, divergence=forward_kl(), baseline=surrogates.leave_one_out
    )
    single = jax.tree.map(lambda x: x[:1], everything(small, small.log_p))
    with refused("at least 2 samples"):
        tuner.update(tuner.init(small.params), single)
