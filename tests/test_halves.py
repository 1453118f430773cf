"""Estimates from samples of π and of p, half and half: their expectations summed over a small space,
and their errors, that of log Z included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, estimators
from fjax.estimators import Estimate
from tests.cases import CASES, each, each_target_of_the_paper, refused, world

# Each compiled as a whole: the many small programs of one that is not take ten times as long.
exact_divergence = jax.jit(divergences.exact_divergence, static_argnames="divergence")
estimate_from_halves = jax.jit(
    estimators.estimate_divergence_from_halves, static_argnames="divergence"
)
KNOWN = Estimate(0.0, 0.0, 1.0)
LOG_Z = -1.5


@functools.partial(jax.jit, static_argnames="divergence")
def of_draws(log_pi, log_p, rows, *, divergence):
    """An estimate from each row's two samples of π and two of p."""
    return jax.vmap(
        lambda row: estimators.estimate_divergence_from_halves(
            log_pi[row[:2]], log_p[row[:2]], log_pi[row[2:]], log_p[row[2:]], KNOWN,
            divergence=divergence,
        )
    )(rows)  # fmt: skip


def over_both(small, log_p, divergence):
    """Every estimate from two samples of π and two of p, with the probability of those."""
    every = np.indices((7,) * 4).reshape(4, -1).T
    rows = every[np.isfinite(log_p[every[:, 2:]]).all(axis=1)]
    # As many rows for every p, some again, so that a divergence is compiled once.
    found = of_draws(small.log_pi, log_p, np.resize(rows, every.shape), divergence=divergence)
    log_probability = small.log_pi[rows[:, :2]].sum(axis=1) + log_p[rows[:, 2:]].sum(axis=1)
    return jax.tree.map(lambda x: x[: len(rows)], found), np.exp(log_probability)


@each
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_divergences_are_unbiased_and_so_are_their_squared_errors(case, hard, x64):
    """E[estimate] = D_f(π‖p) and E[std_error²] = Var[estimate], over all draws of two and two."""
    small = world()
    log_p = small.target(hard=hard)
    exact = float(exact_divergence(small.log_pi, log_p, divergence=case.divergence))

    found, probability = over_both(small, log_p, case.divergence)
    assert probability.sum() == pytest.approx(1, rel=1e-12)
    if hard and not case.allows_zeros:
        assert exact == np.inf
        assert np.isinf(found.value).any()
        assert not np.isnan(found.value).any()
        return
    assert float(probability @ found.value) == pytest.approx(exact, rel=1e-10)
    variance = float(probability @ (found.value - exact) ** 2)
    assert float(probability @ found.std_error**2) == pytest.approx(variance, rel=1e-10)
    assert ((found.ess > 0) & (found.ess <= 4 + 1e-12)).all()


@each_target_of_the_paper
def test_the_error_of_log_z_goes_in_by_the_slope_of_the_expectation(case, hard, x64):
    """Of a large error of log Z all that is left is |dE/dlog Z|, here from the outside: E is summed
    over the space at two values of log Z."""
    small = world()
    log_score = small.target(hard=hard) + LOG_Z

    pairs = np.indices((7, 7)).reshape(2, -1)
    pairs = pairs[:, np.isfinite(log_score[pairs[1]])]

    @jax.jit
    def expected(log_z):
        terms = jax.vmap(
            lambda x, y: estimators.estimate_divergence_from_halves(
                small.log_pi[x[None]], log_score[x[None]], small.log_pi[y[None]],
                log_score[y[None]], Estimate(log_z, 0.0, 1.0), divergence=case.divergence,
            ).value
        )  # fmt: skip
        probability = jnp.exp(small.log_pi[pairs[0]] + log_score[pairs[1]] - LOG_Z)
        return probability @ terms(*pairs)

    step = 1e-5
    slope = float(expected(LOG_Z + step) - expected(LOG_Z - step)) / (2 * step)

    @jax.jit
    def squared_error(log_z_error, *samples):
        log_z = Estimate(LOG_Z, log_z_error, 1.0)
        options = {"divergence": case.divergence}
        found = estimators.estimate_divergence_from_halves(*samples, log_z, **options)
        return found.std_error**2

    # from samples in proportion
    weight = 10**4
    counts = [np.round(weight * np.exp(np.asarray(x))).astype(int) for x in
              (small.log_pi, log_score - LOG_Z)]  # fmt: skip
    mine, theirs = (np.repeat(np.arange(7), n) for n in counts)
    samples = small.log_pi[mine], log_score[mine], small.log_pi[theirs], log_score[theirs]
    found = squared_error(1.0, *samples) - squared_error(0.0, *samples)
    assert float(jnp.sqrt(found)) == pytest.approx(abs(slope), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_no_weight_exceeds_two(seed, x64):
    """So (Σw)²/Σw² is half the number at least; here π and p have little in common."""
    rng = np.random.default_rng(seed)
    log_pi, log_p = (jax.nn.log_softmax(3 * jnp.asarray(rng.normal(size=50))) for _ in range(2))
    mine, theirs = (
        jax.random.categorical(jax.random.key(seed + i), log, shape=(4000,))
        for i, log in enumerate((log_pi, log_p))
    )
    found = estimate_from_halves(
        log_pi[mine], log_p[mine], log_pi[theirs], log_p[theirs], KNOWN,
        divergence=divergences.jensen_shannon(),
    )  # fmt: skip
    assert found.ess >= 4000 * (1 - 0.05)  # Σw is 8000 up to its error
    assert found.value <= np.log(2)
    exact = exact_divergence(log_pi, log_p, divergence=divergences.jensen_shannon())
    assert abs(float(found.value - exact)) < 4 * found.std_error


def test_forward_kl_and_entropy_are_unbiased(x64):
    """And KL(p‖a), which is KL(p‖π) for π = a; log Z has no error here."""
    small = world()
    log_score, log_z = small.log_p_hard + LOG_Z, Estimate(LOG_Z, 0.0, 1.0)
    rows = np.indices((7, 7)).reshape(2, -1).T
    rows = rows[np.isfinite(log_score[rows]).all(axis=1)]
    probability = np.exp(small.log_p_hard[rows].sum(axis=1))

    @jax.jit
    @jax.vmap
    def both(r):
        kl = estimators.estimate_forward_kl_from_target(small.log_pi[r], log_score[r], log_z)
        return kl, estimators.estimate_target_entropy(log_score[r], log_z)

    kl, entropy = both(rows)
    p = np.exp(small.log_p_hard)
    exact_kl = exact_divergence(small.log_pi, small.log_p_hard, divergence=divergences.forward_kl())
    exact_entropy = -np.sum(p * np.where(p > 0, small.log_p_hard, 0.0))
    for found, exact in ((kl, exact_kl), (entropy, exact_entropy)):
        assert float(probability @ found.value) == pytest.approx(float(exact), rel=1e-12)
        variance = float(probability @ (found.value - exact) ** 2)
        assert float(probability @ found.std_error**2) == pytest.approx(variance, rel=1e-10)
        assert (found.ess == 2).all()


REPETITIONS, OF_EACH = 1500, 150


def rejection_runs(log_a, log_score):
    """Samples of the base model until 150 are accepted, 1500 times: rows, log Z and its shares."""
    rng, log_weights = np.random.default_rng(0), log_score - log_a
    chance = np.exp(log_weights - log_weights.max())
    runs = []
    for _ in range(REPETITIONS):
        drawn = rng.choice(len(log_a), p=np.exp(log_a), size=20 * OF_EACH)
        hits = np.flatnonzero(rng.uniform(size=len(drawn)) < chance[drawn])[:OF_EACH]
        weights = np.exp(log_weights[drawn[: hits[-1] + 1]])
        z, error = weights.mean(), weights.std(ddof=1) / np.sqrt(len(weights))
        rows = drawn[hits]
        shares = np.exp(log_weights[rows]) / z / len(weights)
        runs.append((rows, np.log(z), error / z, shares))
    return [np.stack(column) for column in zip(*runs, strict=True)]


@pytest.mark.parametrize("hard", [True, False], ids=["constraint", "tilt"])
def test_errors_know_of_the_samples_that_z_is_from(hard, x64):
    """Over 1500 repetitions the spread of the values is what the errors say: the variance is known
    to √(2/1500) = 3.7 %, and 4 of that are allowed, with 3 % for what is of order 1/150. For a
    tilt the samples of p and log Z have a part in common, without which this would fail."""
    rng = np.random.default_rng(1)
    log_a, log_pi = (np.asarray(jax.nn.log_softmax(jnp.asarray(rng.normal(size=12)))) for _ in "ab")
    rewards = 1.5 * rng.normal(size=12)
    log_score = log_a + np.where(np.arange(12) % 3 == 0, 0.0, -np.inf) if hard else log_a + rewards
    rows, log_z, error, shares = rejection_runs(log_a, log_score)
    mine = rng.choice(12, p=np.exp(log_pi), size=(REPETITIONS, OF_EACH))
    true_z = np.log(np.exp(log_score).sum())
    log_pi, log_score = jnp.asarray(log_pi), jnp.asarray(log_score)

    def figures(mine, rows, log_z, error, shares):
        z, target = Estimate(log_z, error, 1.0), (log_pi[rows], log_score[rows])
        options = {"log_z_shares": shares}
        found = {
            d.name: estimators.estimate_divergence_from_halves(
                log_pi[mine], log_score[mine], *target, z, divergence=d, **options
            )
            for d in (divergences.jensen_shannon(), divergences.total_variation())
        }
        forward = estimators.estimate_forward_kl_from_target(*target, z, **options)
        entropy = estimators.estimate_target_entropy(target[1], z, **options)
        return found | {"forward_kl": forward, "entropy": entropy}

    found = jax.jit(jax.vmap(figures))(mine, rows, log_z, error, shares)
    log_p = log_score - true_z
    for name, estimate in found.items():
        values = np.asarray(estimate.value)
        ratio = np.mean(np.asarray(estimate.std_error) ** 2) / values.var()
        assert ratio == pytest.approx(1, abs=4 * np.sqrt(2 / REPETITIONS) + 0.03), name
        if name == "entropy":
            p = jnp.exp(log_p)
            exact = -jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_p, 0.0), 0.0))
        else:
            of = divergences.by_name(name)
            exact = exact_divergence(log_pi, log_p, divergence=of)
        # 4 errors of the mean, and a bias of order 1/150 of the variance of log Z
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(REPETITIONS) + 0.01, name


def test_what_is_infinite_is_said_to_be_so():
    """A sample of p that the policy cannot say, and one of the policy that p rules out."""
    never, half = jnp.array([-jnp.inf]), jnp.log(jnp.array([0.5]))
    forward = estimators.estimate_forward_kl_from_target(never, half, KNOWN)
    assert (float(forward.value), float(forward.std_error)) == (np.inf, np.inf)
    for case in CASES[:4]:
        samples = half, never, half, half
        found = estimate_from_halves(*samples, KNOWN, divergence=case.divergence)
        assert bool(jnp.isinf(found.value)) is not case.allows_zeros, case.divergence.name


def test_bad_input():
    x, none, js = jnp.zeros(2), jnp.zeros(0), divergences.jensen_shannon()
    with refused("target_log_pi and target_log_score have no sample"):
        estimators.estimate_divergence_from_halves(x, x, none, none, KNOWN, divergence=js)
    with refused("must have one shape"):
        estimators.estimate_divergence_from_halves(x, x, x, none, KNOWN, divergence=js)
    with refused("one number a sample"):
        estimators.estimate_forward_kl_from_target(x[None], x[None], KNOWN)
    with refused("target_log_score have no sample"):
        estimators.estimate_target_entropy(none, KNOWN)
