"""Estimators' expectations summed over a small space; standard errors against the spread they
predict."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration, estimators
from tests.cases import each, each_target_of_the_paper, world


def proposals(small):
    """The policy itself, a distribution that is neither it nor the target, and an even mixture of
    both."""
    mixture = jnp.logaddexp(small.log_pi, small.log_p_hard) - np.log(2)
    return {"policy": (small.log_pi, None), "other": (small.log_q,) * 2, "mixture": (mixture,) * 2}


def over_tuples(log_sampled, n, estimate):
    """Every estimate from n samples, with the probability of those samples."""
    rows = tuples(len(log_sampled), n)
    return jax.vmap(estimate)(rows), np.exp(np.asarray(log_sampled)[rows].sum(axis=1))


def tuples(size, n):
    return np.indices((size,) * n).reshape(n, -1).T


@partial(jax.jit, static_argnames=("estimator", "divergence"))
def estimates(estimator, divergence, rows, log_pi, log_p, log_q):
    """One from each row of samples, compiled once for all targets and proposals."""

    def estimate(rows):
        at = None if log_q is None else log_q[rows]
        return estimator(log_pi[rows], log_p[rows], at, divergence=divergence)

    return jax.vmap(estimate)(rows)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("proposal", ["policy", "other", "mixture"])
@each  # innermost: what an f has compiled serves the next target
def test_divergences_are_unbiased_and_so_are_their_squared_errors(case, hard, proposal, x64):
    """E[estimate] = D_f(π‖p) and E[std_error²] = Var[estimate], over all pairs of samples."""
    small = world()
    log_p = small.target(hard=hard)
    log_sampled, log_q = proposals(small)[proposal]
    exact = float(divergences.exact_divergence(small.log_pi, log_p, divergence=case.divergence))
    rows = tuples(7, 2)
    pairs = estimates(
        estimators.estimate_divergence, case.divergence, rows, small.log_pi, log_p, log_q
    )
    probability = np.exp(np.asarray(log_sampled)[rows].sum(axis=1))
    if hard and not case.allows_zeros:
        assert exact == np.inf
        assert np.isinf(pairs.value).any()
        assert not np.isnan(pairs.value).any()
        return
    assert float(probability @ pairs.value) == pytest.approx(exact, rel=1e-10)
    variance = float(probability @ (pairs.value - exact) ** 2)
    assert float(probability @ pairs.std_error**2) == pytest.approx(variance, rel=1e-10)
    assert (pairs.ess >= 0).all()
    assert (pairs.ess <= 2 + 1e-12).all()


@pytest.mark.parametrize("proposal", ["policy", "other", "mixture"])
def test_z_is_unbiased(proposal, x64):
    small = world()
    log_score = small.log_p_hard - 1.5
    log_sampled, _ = proposals(small)[proposal]
    pairs, probability = over_tuples(
        log_sampled, 2, lambda rows: estimators.estimate_log_z(log_score[rows], log_sampled[rows])
    )
    z = np.exp(pairs.value)
    assert float(probability @ z) == pytest.approx(np.exp(-1.5), rel=1e-12)
    missed = np.isneginf(pairs.value)
    assert missed.any()
    assert np.isinf(pairs.std_error[missed]).all()
    assert not pairs.ess[missed].any()
    # The standard error is that of Z, divided by Z.
    squared = np.where(missed, 0, (z * pairs.std_error) ** 2)
    assert float(probability @ squared) == pytest.approx(
        float(probability @ (z - np.exp(-1.5)) ** 2), rel=1e-10
    )


def replicate(estimate, log_sampled, *, n=1000, times=400, seed=0):
    """Estimates from ``times`` independent batches of n samples."""
    return jax.jit(jax.vmap(estimate))(draws(log_sampled, times=times, n=n, seed=seed))


def draws(log_sampled, *, n=1000, times=400, seed=0):
    p = np.exp(np.asarray(log_sampled, np.float64))
    return np.random.default_rng(seed).choice(len(p), size=(times, n), p=p / p.sum())


def check_spread(batches, exact, *, bias=0.0):
    """Mean within 5 standard errors of the truth, spread as the standard errors say.

    The spread of 400 normal estimates is known to a relative error of 1/√800: 20 % is more than 5
    of those.
    """
    spread = float(np.std(batches.value, ddof=1))
    assert abs(np.mean(batches.value) - exact) < 5 * spread / np.sqrt(len(batches.value)) + bias
    assert float(np.sqrt(np.mean(batches.std_error**2))) == pytest.approx(spread, rel=0.2)


@pytest.mark.parametrize("proposal", ["policy", "other"])
@each_target_of_the_paper
def test_divergence_from_score_knows_the_error_of_its_z(case, hard, proposal, x64):
    small = world()
    log_p = small.target(hard=hard)
    log_sampled, log_q = proposals(small)[proposal]
    exact = divergences.exact_divergence(small.log_pi, log_p, divergence=case.divergence)
    estimator, rows = estimators.estimate_divergence_from_score, draws(log_sampled)
    batches = estimates(estimator, case.divergence, rows, small.log_pi, log_p - 3.0, log_q)
    check_spread(batches, float(exact), bias=3 / 1000)


def test_log_z_spread(x64):
    small = world()
    estimate = replicate(
        lambda rows: estimators.estimate_log_z(small.log_p_hard[rows] - 1.5, small.log_q[rows]),
        small.log_q,
    )
    check_spread(estimate, -1.5, bias=3 / 1000)


def test_moments_of_policy_and_target_from_samples_of_neither(x64):
    small = world()
    feature = jnp.asarray(np.random.default_rng(0).normal(size=7))
    for log_weighted in (small.log_pi, small.log_p_hard):
        batches = replicate(
            lambda rows, to=log_weighted: estimators.estimate_mean(
                feature[rows], to[rows] + 100 - small.log_q[rows]
            ),
            small.log_q,
        )
        check_spread(batches, float(jnp.exp(log_weighted) @ feature), bias=3 / 1000)


def test_entropy_and_kl_to_base(x64):
    small = world()
    pi = np.exp(small.log_pi)
    entropy, kl = -pi @ small.log_pi, pi @ (small.log_pi - small.log_q)
    singles, probability = over_tuples(
        small.log_pi, 1, lambda rows: estimators.estimate_entropy(small.log_pi[rows])
    )
    assert float(probability @ singles.value) == pytest.approx(float(entropy), rel=1e-12)
    singles, probability = over_tuples(
        small.log_pi,
        1,
        lambda rows: estimators.estimate_kl_to_base(small.log_pi[rows], small.log_q[rows]),
    )
    assert float(probability @ singles.value) == pytest.approx(float(kl), rel=1e-12)
    uniform = jnp.full(7, -np.log(7))
    batches = replicate(
        lambda rows: estimators.estimate_kl_to_base(
            small.log_pi[rows], small.log_q[rows], uniform[rows]
        ),
        uniform,
    )
    check_spread(batches, float(kl), bias=3 / 1000)
    batches = replicate(
        lambda rows: estimators.estimate_entropy(small.log_pi[rows], uniform[rows]), uniform
    )
    check_spread(batches, float(entropy), bias=3 / 1000)


def test_hardly_a_sample_in_the_support(x64):
    """A word of base rate 1 in 500, samples of the base model: the others count, as zeros; no
    NaN."""
    satisfied = jnp.arange(1000) < 2
    log_a = jnp.full(1000, -np.log(1000.0))
    log_score = jnp.where(satisfied, log_a, -jnp.inf)
    log_p = log_score - np.log(2 / 1000)
    kl, tv = divergences.forward_kl(), divergences.total_variation()
    for divergence, exact in ((kl, np.log(500)), (tv, 0.998)):
        estimate = estimators.estimate_divergence(log_a, log_p, divergence=divergence)
        assert float(estimate.value) == pytest.approx(exact, rel=1e-12)
        assert float(estimate.ess) == pytest.approx(2)
        from_score = estimators.estimate_divergence_from_score(
            log_a, log_score, divergence=divergence
        )
        assert float(from_score.value) == pytest.approx(exact, rel=1e-12)


@each
def test_masked_samples_do_not_matter(case, x64):
    small = world()
    junk = jnp.array([jnp.nan, jnp.inf, -jnp.inf])

    def padded(x):
        return jnp.concatenate([x, junk])

    where = jnp.arange(10) < 7
    arguments = (small.log_pi, small.log_p, small.log_q)
    values = jnp.arange(7.0)
    pairs = [
        (estimators.estimate_divergence, arguments, {"divergence": case.divergence}),
        (estimators.estimate_divergence_from_score, arguments, {"divergence": case.divergence}),
        (estimators.estimate_log_z, arguments[1:], {}),
        (estimators.estimate_mean, (values, small.log_q), {}),
        (estimators.estimate_mean, (values,), {}),
        (estimators.estimate_kl_to_base, arguments, {}),
        (estimators.estimate_entropy, arguments[:2], {}),
    ]
    for function, inputs, options in pairs:
        plain = function(*inputs, **options)
        masked = function(*map(padded, inputs), where=where, **options)
        np.testing.assert_allclose(masked, plain, rtol=1e-12, err_msg=function.__name__)
    ess = estimators.effective_sample_size(padded(small.log_q), where=where)
    assert float(ess) == pytest.approx(float(estimators.effective_sample_size(small.log_q)))


def test_no_sample_in_the_support_is_said_and_not_divided_by():
    log_pi, nothing = jnp.zeros(3), jnp.full(3, -jnp.inf)
    z = estimators.estimate_log_z(nothing, log_pi)
    assert (float(z.value), float(z.std_error), float(z.ess)) == (-np.inf, np.inf, 0)
    for estimate in (
        estimators.estimate_mean(jnp.ones(3), nothing),
        estimators.estimate_divergence_from_score(
            log_pi, nothing, divergence=divergences.forward_kl()
        ),
    ):
        assert np.isnan(estimate.value)
        assert (float(estimate.std_error), float(estimate.ess)) == (np.inf, 0)


def test_equal_weights_give_the_plain_mean_and_its_error(x64):
    values = jnp.array([1.0, 2.0, 6.0])
    np.testing.assert_allclose(
        estimators.estimate_mean(values, jnp.full(3, -7.0)),
        estimators.estimate_mean(values),
        rtol=1e-12,
    )


def test_streaming_equals_all_at_once(x64):
    log_weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8))).at[1].set(-jnp.inf)
    running = estimators.running_log_mean()
    state, _ = jax.lax.scan(
        lambda state, x: (running.update(state, x), None), running.init(), log_weights
    )
    assert state.count == 40
    w = np.exp(log_weights.ravel())
    expected = np.log(w.mean()), w.std(ddof=1) / np.sqrt(40) / w.mean(), w.sum() ** 2 / (w**2).sum()
    np.testing.assert_allclose(running.estimate(state), expected, rtol=1e-12)


def test_the_state_keeps_its_dtype_whatever_the_weights_have(x64):
    state = estimators.update_log_mean(
        estimators.init_log_mean(jnp.float32), jnp.zeros(3, jnp.float64)
    )
    assert {x.dtype for x in state} == {jnp.dtype("float32")}
    # no sum of many in that
    assert {x.dtype for x in estimators.init_log_mean(jnp.bfloat16)} == {jnp.dtype("float32")}


def test_a_defensive_mixture_is_the_density_of_what_was_drawn(x64):
    """Its weights are bounded by 1/ε, and estimates with it are unbiased: Σ_x q(x) P(x)/q(x) = Z,
    in full."""
    # hardly covers what the target wants
    log_pi = jax.nn.log_softmax(jnp.array([30.0, 0.0, 1.0, -5.0]))
    log_a = jax.nn.log_softmax(jnp.array([0.0, 1.0, -1.0, 0.5]))
    log_score = log_a + jnp.log(jnp.array([0.0, 1.0, 1.0, 1.0]))
    for share in (0.125, 0.5):
        log_q = estimators.log_mixture(log_pi, log_a, base_fraction=share)
        np.testing.assert_allclose(
            jnp.exp(log_q), (1 - share) * jnp.exp(log_pi) + share * jnp.exp(log_a), rtol=1e-12
        )
        assert jnp.exp(log_score - log_q).max() <= 1 / share
        assert jnp.exp(log_pi - log_q).max() <= 1 / (1 - share)
    np.testing.assert_array_equal(estimators.log_mixture(log_pi, log_a, base_fraction=0.0), log_pi)
    np.testing.assert_array_equal(estimators.log_mixture(log_pi, log_a, base_fraction=1.0), log_a)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        estimators.log_mixture(log_pi, log_a, base_fraction=1.5)


def test_streaming_in_float32_at_the_scale_of_sequences():
    """Weights near e^-1000, as of long sequences, are means as exact as those near 1."""
    state = estimators.init_log_mean()
    for _ in range(100):
        state = estimators.update_log_mean(state, jnp.log(jnp.array([1.0, 3.0])) - 1000)
    estimate = estimators.log_mean_estimate(state)
    assert float(estimate.value) == pytest.approx(np.log(2) - 1000, abs=1e-3)
    assert float(estimate.std_error) == pytest.approx(0.5 / np.sqrt(199), rel=1e-2)
    assert float(estimate.ess) == pytest.approx(160, rel=1e-2)


@pytest.mark.parametrize("level", [-1000.0, -300.0])
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["equal", "spread"])
def test_a_hundred_thousand_updates_in_float32_forget_nothing(level, spread):
    """Regression: log Σ w in float32 has no digits left for what one batch adds: -1.12 nats at
    -1000 by the end."""
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 4)), jnp.float32)
    log_weights = level + spread * noise

    def step(state, i):
        return estimators.update_log_mean(state, log_weights[i % 1000]), None

    state, _ = jax.jit(
        lambda: jax.lax.scan(step, estimators.init_log_mean(), jnp.arange(100_000))
    )()
    w = np.exp(np.asarray(log_weights, np.float64).ravel() - level)
    estimate = estimators.log_mean_estimate(state)
    # two units in the last place
    assert float(estimate.value) == pytest.approx(np.log(w.mean()) + level, abs=1e-4)
    assert float(state.count) == 400_000
    n, ess = 400_000, 400_000 * w.mean() ** 2 / (w**2).mean()
    assert float(estimate.ess) == pytest.approx(ess, rel=2e-5)
    assert float(estimate.std_error) == pytest.approx(
        np.sqrt(max(n / ess - 1, 0) / (n - 1)), rel=1e-4, abs=1e-6
    )


def test_the_count_goes_on_beyond_what_a_float32_can_add_one_to():
    state = estimators.init_log_mean()
    state = state._replace(sums=jnp.array([2.0**24, 2.0**24, 2.0**24]), largest=jnp.array(0.0))
    step = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 1000, lambda _, s: estimators.update_log_mean(s, jnp.zeros(1)), state
        )
    )
    state = step(state)
    assert float(state.count) == 2**24 + 1000
    assert float(estimators.log_mean_estimate(state).value) == pytest.approx(0, abs=1e-7)


def test_a_new_largest_weight_and_weights_of_zero_change_the_unit_only(x64):
    """By batches: all zero, then small, then larger by e^500, then small again; also for contexts,
    by vmap."""
    batches = jnp.array(
        [[-jnp.inf, -jnp.inf], [-900.0, -jnp.inf], [-400.0, -401.0], [-900.0, -400.5]]
    )
    expected = np.log(np.exp(np.asarray(batches) + 400).mean()) - 400
    state, several = (
        estimators.init_log_mean(),
        jax.tree.map(lambda x: jnp.stack([x] * 2), estimators.init_log_mean()),
    )
    for batch in batches:
        state = estimators.update_log_mean(state, batch)
        several = jax.vmap(estimators.update_log_mean)(several, jnp.stack([batch, batch + 7]))
    assert float(estimators.log_mean_estimate(state).value) == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(
        jax.vmap(estimators.log_mean_estimate)(several).value, [expected, expected + 7], rtol=1e-14
    )


@pytest.mark.usefixtures("bare")
def test_the_states_of_contexts_are_not_taken_for_one():
    """Three contexts have as many numbers as one state has sums."""
    state = jax.tree.map(lambda x: jnp.stack([x] * 3), estimators.init_log_mean())
    with pytest.raises(ValueError, match=r"must be one number, got shape \[3\].*jax\.vmap"):
        estimators.log_mean_estimate(state)
    with pytest.raises(ValueError, match=r"jax\.vmap"):
        estimators.update_log_mean(state, jnp.zeros(3))


def test_a_weight_that_is_no_number_is_seen():
    for bad in (jnp.nan, jnp.inf):
        state = estimators.update_log_mean(estimators.init_log_mean(), jnp.array([0.0, bad]))
        state = estimators.update_log_mean(state, jnp.zeros(2))
        assert not np.isfinite(estimators.log_mean_estimate(state).value)


def test_streaming_before_the_first_hit():
    state = estimators.update_log_mean(estimators.init_log_mean(), jnp.full(4, -jnp.inf))
    estimate = estimators.log_mean_estimate(state)
    assert (float(estimate.value), float(estimate.std_error), float(estimate.ess)) == (
        -np.inf,
        np.inf,
        0,
    )
    state = estimators.update_log_mean(state, jnp.zeros(4))
    assert float(estimators.log_mean_estimate(state).value) == pytest.approx(np.log(0.5))


def test_state_can_be_donated():
    update = jax.jit(estimators.update_log_mean, donate_argnums=0)
    state = update(estimators.init_log_mean(), jnp.zeros(2))
    assert float(estimators.log_mean_estimate(update(state, jnp.zeros(2))).ess) == 4


@each
def test_float32_extremes_are_never_nan(case):
    ends = jnp.array([-jnp.inf, -1e4, -100.0, -1.0, 0.0])
    log_pi, log_p, log_q = (x.ravel() for x in jnp.meshgrid(ends, ends, ends[1:]))

    def single(*x):
        return estimators.estimate_divergence(*(i[None] for i in x), divergence=case.divergence)

    assert not np.isnan(jax.jit(jax.vmap(single))(log_pi, log_p, log_q).value).any()
    entropies = jax.vmap(lambda x, q: estimators.estimate_entropy(x[None], q[None]).value)(
        log_pi, log_q
    )
    assert np.isnan(entropies).sum() == np.isneginf(log_pi).sum()  # no weight at all


def test_a_sample_that_the_policy_never_draws_weighs_nothing():
    estimate = estimators.estimate_entropy(jnp.array([-1.0, -jnp.inf]), jnp.array([-1.0, -1.0]))
    assert float(estimate.value) == pytest.approx(1)


def test_nothing_is_differentiated(x64):
    small = world()

    def total(log_pi, log_p, log_q):
        options = {"divergence": divergences.jensen_shannon()}
        return (
            estimators.estimate_divergence(log_pi, log_p, log_q, **options).value
            + estimators.estimate_divergence_from_score(log_pi, log_p, log_q, **options).value
            + estimators.estimate_kl_to_base(log_pi, log_p, log_q).value
            + estimators.effective_sample_size(log_pi)
            + estimators.estimate_log_z(log_p, log_q).value
        )

    assert not any(
        g.any() for g in jax.grad(total, argnums=(0, 1, 2))(small.log_pi, small.log_p, small.log_q)
    )


def test_the_bound_of_every_report_holds(x64):
    """KL(p‖π) ≥ -log E_π[b], in estimates from the same samples too (mathematics.md, 1.4)."""
    small = world()
    rows = jax.random.categorical(jax.random.key(1), small.log_pi, shape=(5000,))
    satisfied = jnp.isfinite(small.log_p_hard[rows])
    kl = estimators.estimate_divergence_from_score(
        small.log_pi[rows], small.log_p_hard[rows], divergence=divergences.forward_kl()
    )
    rate = estimators.estimate_mean(satisfied.astype(float))
    assert float(kl.value) >= -np.log(float(rate.value))
    assert float(kl.ess) <= 5000 * float(rate.value) + 1e-6


def test_log_z_of_a_whole_space_is_the_exact_one(x64):
    """Each member once, sampled from the uniform distribution: the estimate is the sum itself."""
    small = world()
    uniform = jnp.full(7, -np.log(7))
    estimate = estimators.estimate_log_z(small.log_q - 2, uniform)
    assert float(estimate.value) == pytest.approx(
        float(enumeration.exact_log_z(small.log_q - 2)), rel=1e-12
    )


def test_the_proposal_gain_is_the_difference_of_two_divergences(x64):
    """Every sequence as often as q says, which makes sums over samples sums over the space."""
    w = world()
    counts = np.random.default_rng(0).integers(1, 20, size=7)
    rows, log_q = np.repeat(np.arange(7), counts), np.log(counts / counts.sum())
    log_pi, log_r = w.log_pi, w.log_q
    for log_p in (w.log_p, w.log_p_hard):
        gain = estimators.estimate_proposal_gain(
            log_pi[rows], log_r[rows], 0.7 + log_p[rows], jnp.asarray(log_q)[rows]
        )
        to_r, to_pi = (
            divergences.exact_divergence(x, log_p, divergence=divergences.forward_kl())
            for x in (log_r, log_pi)
        )
        assert float(gain.value) == pytest.approx(float(to_r - to_pi), rel=1e-12)
        exchanged = estimators.estimate_proposal_gain(
            log_r[rows], log_pi[rows], log_p[rows], jnp.asarray(log_q)[rows]
        )
        assert float(exchanged.value) == pytest.approx(-float(gain.value), rel=1e-12)
        assert float(exchanged.std_error) == pytest.approx(float(gain.std_error), rel=1e-12)


def test_without_a_sample_of_the_target_nothing_is_gained():
    zeros = jnp.zeros(3)
    gain = estimators.estimate_proposal_gain(zeros + 1, zeros, zeros - jnp.inf, zeros)
    assert (float(gain.value), float(gain.std_error), float(gain.ess)) == (0, np.inf, 0)
