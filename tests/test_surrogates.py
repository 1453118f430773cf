"""Score weights, baselines and the loss they make: formulas, ends of float32, strata. That the
expected gradient is that of the divergence is in laws/test_expected_gradient.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fjax import divergences, estimators, surrogates
from tests.cases import CASES, each, each_target_of_the_paper, name, refused, world


@each_target_of_the_paper
@pytest.mark.parametrize("kind", ["control variate", "weights"])
def test_self_normalisation_is_consistent(case, hard, kind, x64):
    """The mean over 300 batches of 1000 is within 5 standard errors and 1/100, for the bias of
    order 1/n, of exact."""
    small = world()
    log_p = small.target(hard=hard)
    gradient = small.exact_gradient(log_p, case.divergence)
    rows = jax.random.categorical(jax.random.key(0), small.log_q, shape=(300, 1000))

    @jax.jit
    @jax.vmap
    def of_batches(rows):
        log_pi, log_q = small.log_pi[rows], small.log_q[rows]
        if kind == "weights":
            log_q = surrogates.self_normalized_log_q(log_pi, log_q)
            assert surrogates.importance_weights(log_pi, log_q).shape == rows.shape
        weights = surrogates.score_weights(log_pi, log_p[rows], log_q, divergence=case.divergence)
        if kind == "control variate":
            baseline = surrogates.self_normalized(log_pi, log_q)
            weights = surrogates.centred_weights(weights, log_pi, log_q, baseline=baseline)
        # what each of the seven sequences is multiplied with
        return jnp.zeros(7).at[rows].add(weights / 1000)

    weights = of_batches(rows)
    if kind == "control variate":
        np.testing.assert_allclose(weights.sum(axis=1), 0, atol=1e-12)
    gradients = np.einsum("bs,spv->bpv", weights, small.scores)
    mean, error = gradients.mean(axis=0), gradients.std(axis=0) / np.sqrt(300)
    assert (abs(mean - gradient) <= 5 * error + 0.01 * abs(gradient).max()).all()


def test_a_running_mean_knows_earlier_batches_only(x64):
    baseline = surrogates.running_mean(0.9)
    state = baseline.init()
    assert float(baseline.value(state)) == 0
    for value in (2.0, 2.0, 5.0):
        state = baseline.update(state, jnp.full(3, value))
    expected = (0.9**2 * 0.1 * 2 + 0.9 * 0.1 * 2 + 0.1 * 5) / (1 - 0.9**3)
    assert float(baseline.value(state)) == pytest.approx(expected, rel=1e-12)
    with refused("decay is at least 0"):
        surrogates.running_mean(1.0)


@each
def test_weights_are_the_formula_where_nothing_overflows(case, x64):
    rng = np.random.default_rng(1)
    log_pi, log_p, log_q = jnp.asarray(rng.normal(scale=3, size=(3, 200)))
    f, clip = case.divergence, (-0.3, 0.2)

    @jax.jit
    def ours(log_pi, log_p, log_q):
        return (
            surrogates.score_weights(log_pi, log_p, log_q, divergence=f),
            surrogates.score_weights(log_pi, log_p, log_q, divergence=f, clip=clip),
            surrogates.pseudo_rewards(log_pi, log_p, divergence=f, clip=clip),
            surrogates.importance_weights(log_pi, log_q),
        )

    ratio, derivative = np.exp(log_pi - log_q), np.asarray(f.derivative(log_pi - log_p))
    clipped = np.clip(derivative, *clip)
    theirs = (ratio * derivative, ratio * clipped, -clipped, ratio)
    for our, their in zip(ours(log_pi, log_p, log_q), theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-12)


@each
def test_float32_weights_are_never_nan(case):
    """Over every combination of extreme π, p and q; -inf included, but for q, from which the sample
    came."""
    ends = jnp.array([-jnp.inf, -1e4, -1e3, -100.0, -90.0, -1.0, 0.0])
    log_pi, log_p, log_q = (x.ravel() for x in jnp.meshgrid(ends, ends, ends[1:]))
    bounds = (-10.0, 10.0)

    @jax.jit
    def weights(log_pi, log_p, log_q):
        of = functools.partial(surrogates.score_weights, divergence=case.divergence)
        clipped = [of(log_pi, log_p, q, clip=bounds) for q in (None, log_q)]
        return [*clipped, of(log_pi, log_p), of(log_pi, log_p, log_q)]

    on_policy, *others = weights(log_pi, log_p, log_q)
    assert np.isfinite(on_policy).all()
    assert not np.isnan(others).any()


@each
def test_float32_gradient_of_the_loss_is_never_nan(case):
    ends = jnp.array([-jnp.inf, -1e4, -100.0, -1.0, 0.0])
    log_pi, log_p = (x.ravel() for x in jnp.meshgrid(ends[1:], ends))

    @jax.jit
    @jax.grad
    def gradient(log_pi):
        losses = [
            surrogates.surrogate_loss(
                log_pi, log_p, log_q, divergence=case.divergence, baseline=0.5, clip=(-100.0, 100.0)
            )
            for log_q in (None, jnp.full_like(log_pi, -100.0))
        ]
        return losses[0].sum() + losses[1].sum()

    assert not np.isnan(gradient(log_pi)).any()


@each
@pytest.mark.parametrize("log_p", [-jnp.inf, -1.0])
def test_a_sample_that_the_policy_never_draws_is_worth_nothing_and_not_nan(case, log_p):
    """Its weight π/q is 0, and 0 · log π would be 0 · -inf: one such sample, and the sum of all
    losses is NaN."""
    log_pi, log_p, log_q = jnp.array([[-jnp.inf, -2.0], [log_p, -2.0], [-1.0, -1.0]])
    value, gradient = loss_and_gradient(log_pi, log_p, log_q, divergence=case.divergence)
    assert np.isfinite(value)
    assert gradient[0] == 0
    assert np.isfinite(gradient[1])


@functools.partial(jax.jit, static_argnames="divergence")
@jax.value_and_grad
def loss_and_gradient(log_pi, log_p, log_q, *, divergence):
    losses = surrogates.surrogate_loss(
        log_pi, log_p, log_q, divergence=divergence, clip=(-1.0, 1.0)
    )
    return losses.sum()


def test_float32_weights_where_single_factors_overflow():
    """Forward KL is -p/q and reverse KL (π/q)(log t + 1), however far from float32 π/q or f' alone
    may be."""
    log_pi, log_p, log_q = jnp.array(
        [[-300.0, -1000.0, -1000.0], [-3.0, -2.0, -1003.0], [-2.0, -101.0, -1002.0]]
    )
    forward = surrogates.score_weights(log_pi, log_p, log_q, divergence=divergences.forward_kl())
    np.testing.assert_allclose(forward, [-np.exp(-1), -np.inf, -np.exp(-1)], rtol=1e-5)
    reverse = surrogates.score_weights(
        jnp.array([-100.0]),
        jnp.array([0.0]),
        jnp.array([-100.0]),
        divergence=divergences.reverse_kl(),
    )
    np.testing.assert_allclose(reverse, [-99.0], rtol=1e-5)


def test_reverse_kl_on_a_hard_constraint_is_infinite_unless_clipped():
    log_pi, log_p = jnp.array([-1.0, -1.0]), jnp.array([-1.0, -jnp.inf])
    divergence = divergences.reverse_kl()
    assert surrogates.score_weights(log_pi, log_p, divergence=divergence).tolist() == [1, np.inf]
    assert surrogates.score_weights(
        log_pi, log_p, divergence=divergence, clip=(-5, 5)
    ).tolist() == [1, 5]


def test_only_log_pi_is_differentiated(x64):
    small = world()

    def total(log_pi, log_p, log_q):
        return surrogates.surrogate_loss(
            log_pi,
            log_p,
            log_q,
            divergence=divergences.jensen_shannon(),
            baseline=surrogates.leave_one_out,
        ).sum()

    by_pi, by_p, by_q = jax.grad(total, argnums=(0, 1, 2))(small.log_pi, small.log_p, small.log_q)
    assert not by_p.any()
    assert not by_q.any()
    weights = surrogates.score_weights(
        small.log_pi, small.log_p, small.log_q, divergence=divergences.jensen_shannon()
    )
    centred = surrogates.centred_weights(
        weights, small.log_pi, small.log_q, baseline=surrogates.leave_one_out
    )
    np.testing.assert_allclose(by_pi, centred, rtol=1e-13)


def test_on_policy_equals_off_policy_with_q_equal_to_pi(x64):
    small = world()
    for case in CASES:

        @jax.jit
        def losses(log_pi, log_p, f=case.divergence):
            loss = functools.partial(
                surrogates.surrogate_loss, divergence=f, baseline=surrogates.leave_one_out
            )
            return loss(log_pi, log_p), loss(log_pi, log_p, log_pi)

        on, off = losses(small.log_pi, small.log_p)
        np.testing.assert_allclose(on, off, rtol=1e-12)


def test_contexts_come_from_vmap(x64):
    """A leave-one-out baseline of each context's own samples, as calling it once for each context
    gives."""
    log_pi, log_p, log_q = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)))
    loss = functools.partial(
        surrogates.surrogate_loss,
        divergence=divergences.total_variation(),
        baseline=surrogates.leave_one_out,
    )
    together = jax.jit(jax.vmap(loss))(log_pi, log_p, log_q)
    np.testing.assert_allclose(
        together, [loss(*rows) for rows in zip(log_pi, log_p, log_q, strict=True)]
    )


def test_leave_one_out_of_the_samples_that_count():
    scores = jnp.array([1.0, jnp.nan, 3.0, 8.0])
    where = jnp.array([True, False, True, True])
    baseline = surrogates.leave_one_out(scores, where=where)
    np.testing.assert_allclose(baseline[where], [5.5, 4.5, 2.0])
    assert surrogates.leave_one_out(scores, where=jnp.array([True, False, False, False]))[0] == 0


@functools.cache
def draws(n: int, m: int):
    """Every draw of n sequences from the policy and m from the base model: rows, and the
    probability of each draw."""
    small = world()
    rows = np.indices((7,) * (n + m)).reshape(n + m, -1).T
    return rows, np.exp(
        small.log_pi[rows[:, :n]].sum(axis=1) + small.log_q[rows[:, n:]].sum(axis=1)
    )


@functools.cache
def leave_one_out_of(*strata: int | None):
    named = None if strata[0] is None else jnp.array(strata)
    return jax.jit(jax.vmap(functools.partial(surrogates.leave_one_out, strata=named)))


@functools.partial(jax.jit, static_argnums=3)
def score_weights(log_pi, log_p, log_q, divergence):
    return surrogates.score_weights(log_pi, log_p, log_q, divergence=divergence)


def gradient_on_fixed_numbers(case, n, m, *, strata):
    """E[∇ mean loss] over all draws of exactly n and m, with log q that of their mixture, as a
    batch of `draw` is."""
    small = world()
    log_mixture = estimators.log_mixture(small.log_pi, small.log_q, base_fraction=m / (n + m))
    rows, probability = draws(n, m)
    of_sequence = score_weights(small.log_pi, small.log_p, log_mixture, case.divergence)
    ratio = surrogates.importance_weights(small.log_pi, log_mixture)
    baseline = leave_one_out_of(*([0] * n + [1] * m if strata else [None]))(of_sequence[rows])
    weights = of_sequence[rows] - ratio[rows] * baseline
    total = np.bincount(rows.ravel(), (probability[:, None] * weights).ravel(), minlength=7) / (
        n + m
    )
    return np.einsum("s,spv->pv", total, small.scores)


@each
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_leaving_one_out_of_its_stratum_is_unbiased_on_fixed_numbers(case, n, m, x64):
    """n samples of the policy and m of the base model, never another split: what a batch with a
    defensive share is."""
    gradient = world().exact_gradient(world().log_p, case.divergence)
    error = abs(gradient_on_fixed_numbers(case, n, m, strata=True) - gradient).max()
    assert error < 1e-10 * max(1, abs(gradient).max())


@pytest.mark.parametrize(("n", "m", "least"), [(1, 1, 0.02), (4, 1, 0.004)])
@pytest.mark.parametrize("of", ["reverse_kl", "total_variation", "jensen_shannon"])
def test_leaving_one_out_of_all_is_biased_on_fixed_numbers(of, n, m, least, x64):
    """Regression: a sample of the policy leaves fewer of its kind behind than one of the base model
    does."""
    case = next(case for case in CASES if name(case) == of)
    gradient = world().exact_gradient(world().log_p, case.divergence)
    error = (
        abs(gradient_on_fixed_numbers(case, n, m, strata=False) - gradient).max()
        / abs(gradient).max()
    )
    assert least < error < 0.5


def test_leave_one_out_by_strata_is_its_formula(x64):
    """Written out: any number of strata, under any names, some of the samples masked; single
    members add nothing."""
    rng = np.random.default_rng(3)
    scores, strata, where = (
        rng.normal(size=12),
        rng.choice([0, 3, 7, 11], 12),
        rng.uniform(size=12) < 0.8,
    )
    strata[np.argmax(where)], scores[~where], strata[~where] = 5, np.nan, -1
    expected = np.zeros(12)
    for i, s in itertools.product(range(12), set(strata[where])):
        members = where & (strata == s)
        others = members & (np.arange(12) != i)
        if members.sum() > 1:
            expected[i] += members.sum() / where.sum() * scores[others].mean()
    baseline = surrogates.leave_one_out(
        jnp.asarray(scores), where=jnp.asarray(where), strata=jnp.asarray(strata)
    )
    np.testing.assert_allclose(baseline, expected, rtol=1e-13)
    spread = jax.shard_map(
        lambda x, w, s: surrogates.leave_one_out(x, where=w, strata=s, axis_name="rows"),
        mesh=Mesh(np.array(jax.devices()[:4]), ("rows",)), in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"),
    )  # fmt: skip
    baseline = jax.jit(spread)(jnp.asarray(scores), jnp.asarray(where), jnp.asarray(strata))
    np.testing.assert_allclose(baseline, expected, rtol=1e-13)


def test_a_stratum_that_there_is_not_is_seen():
    baseline = surrogates.leave_one_out(jnp.array([1.0, 2.0, 4.0]), strata=jnp.array([0, 0, 3]))
    assert np.isnan(baseline).tolist() == [False, False, True]
    with refused(r"one integer a sample, of shape \[3\]; got float32"):
        surrogates.leave_one_out(jnp.ones(3), strata=jnp.ones(3))


@pytest.mark.parametrize("score", [100.1, 1e30])
@pytest.mark.parametrize(
    "options", [{}, {"where": jnp.arange(16) > 3}, {"strata": jnp.arange(16) % 3}], ids=", ".join
)
def test_equal_scores_leave_exactly_nothing(score, options):
    """Regression: the mean of sixteen times 100.1 is another number, and what is left was noise of
    rounding."""
    scores = jnp.full(16, score)
    rounded = jnp.nextafter(scores, jnp.inf).at[::2].set(score)
    counted = options.get("where", jnp.ones(16, bool))

    def left(scores, options, axis_name=None):
        return scores - surrogates.leave_one_out(scores, axis_name=axis_name, **options)

    spread = jax.shard_map(
        functools.partial(left, axis_name="rows"), mesh=Mesh(np.array(jax.devices()), ("rows",)),
        in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"),
    )  # fmt: skip
    for of in (jax.jit(left), jax.jit(spread)):
        assert not of(scores, options)[counted].any()
        assert not of(rounded, options)[counted].any()


def test_a_small_spread_is_no_rounding():
    scores = 100 + jnp.arange(4) / 1024
    np.testing.assert_allclose(
        scores - surrogates.leave_one_out(scores), (jnp.arange(4) - 1.5) / 768, atol=8e-6
    )


def test_misuse_is_refused():
    one, two = jnp.zeros(1), jnp.zeros(2)
    kl = divergences.forward_kl()
    with refused(r"\[2\] and \[1\]"):
        surrogates.surrogate_loss(two, one, divergence=kl)
    with refused(r"increasing|\(lowest, highest\).*\(1.0, 1.0\)"):
        surrogates.score_weights(two, two, divergence=kl, clip=(1.0, 1.0))
    with refused("at least 2 samples, got 1"):
        surrogates.surrogate_loss(one, one, divergence=kl, baseline=surrogates.leave_one_out)
    with refused(r"got \(1,\)"):
        surrogates.surrogate_loss(two, two, divergence=kl, baseline=one)
