"""Quasi-rejection: what the estimates say of their own error, checked from both sides, and the β of
a wished rate; exactness is in the catalogue."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from fjax.estimators import Estimate
from fjax.rejection import accept, choose_log_beta, estimate_rejection, log_acceptance
from tests.cases import refused

RUNS, N = 3000, 300
LOG_BETA = 0.2


def proposals():
    """Batches of proposals from a q of six members, and the truth."""
    rng = np.random.default_rng(0)
    q, score = rng.dirichlet(2 * np.ones(6)), rng.uniform(size=6) * np.array([1, 1, 0, 1, 1, 1])
    rows = jax.random.categorical(jax.random.key(0), jnp.log(jnp.asarray(q)), shape=(RUNS, N))
    z_beta = np.minimum(score, np.exp(LOG_BETA) * q).sum()
    with np.errstate(divide="ignore"):
        logs = jnp.log(jnp.asarray(score))[rows], jnp.log(jnp.asarray(q))[rows]
    return *logs, z_beta / np.exp(LOG_BETA), score.sum(), 1 - z_beta / score.sum()


def check_error(estimate: Estimate, truth: float):
    """Over 3000 batches the spread of the values is what their errors say: the ratio of the
    variances is 1 ± 5 of its errors.

    That ratio has a relative error of √(2/3000) = 2.6 %, to which comes 1 % for the bias of a ratio
    of means of 300.
    """
    value, error = np.asarray(estimate.value), np.asarray(estimate.std_error)
    assert value.var() / (error**2).mean() == pytest.approx(1, abs=5 * np.sqrt(2 / RUNS) + 0.01)
    # a bias of order 1/n
    assert abs(value.mean() - truth) < 5 * value.std() / np.sqrt(RUNS) + 0.1 * value.std()


def test_standard_errors_are_neither_too_small_nor_too_large(x64):
    log_score, log_q, rate, z, bound = proposals()
    estimate = jax.vmap(lambda p, q: estimate_rejection(p, q, log_beta=LOG_BETA))(log_score, log_q)
    check_error(estimate.acceptance_rate, rate)
    check_error(estimate.tv_bound, bound)
    assert (estimate.acceptance_rate.ess == N).all()
    # With log Z from elsewhere its error counts too: of a size with that of Z_β itself, so that
    # neither could be missing.
    noise = 0.05
    log_z = np.log(z) + noise * np.random.default_rng(1).normal(size=RUNS)

    def with_z(p, q, log_z):
        known = Estimate(log_z, jnp.asarray(noise), jnp.asarray(100.0))
        return estimate_rejection(p, q, log_beta=LOG_BETA, log_z=known).tv_bound

    estimate = jax.vmap(with_z)(log_score, log_q, jnp.asarray(log_z))
    check_error(estimate, bound)
    certain = jax.vmap(lambda p, q: with_z(p, q, jnp.log(z)))(log_score, log_q)
    assert certain.value.var() < 0.9 * estimate.value.var()


def test_coins_fall_as_often_as_they_should():
    """In half precision too, where a coin of bfloat16 would have 256 sides only. 5 standard
    errors."""
    log_score, log_q, rate, *_ = proposals()
    for dtype in (jnp.float32, jnp.bfloat16):
        scores = log_score.ravel().astype(dtype), log_q.ravel().astype(dtype)
        expected = float(jnp.exp(log_acceptance(*scores, log_beta=LOG_BETA)).mean())
        kept = float(accept(jax.random.key(1), *scores, log_beta=LOG_BETA).mean())
        assert abs(kept - expected) < 5 * np.sqrt(rate * (1 - rate) / (RUNS * N))


def test_proposals_may_be_spread_over_devices():
    log_score, log_q, *_ = proposals()
    rows = PartitionSpec("rows")
    spread = jax.shard_map(
        lambda p, q: estimate_rejection(p, q, log_beta=LOG_BETA, axis_name="rows"),
        mesh=Mesh(np.array(jax.devices()[:4]), ("rows",)), in_specs=rows, out_specs=PartitionSpec(),
    )  # fmt: skip
    expected = estimate_rejection(log_score[0], log_q[0], log_beta=LOG_BETA)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        jax.jit(spread)(log_score[0], log_q[0]),
        expected,
    )


def acceptance(log_score, log_q, log_beta) -> float:
    return float(jnp.exp(log_acceptance(log_score, log_q, log_beta=log_beta)).mean())


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.1, 0.3, 0.5, 0.6])
def test_beta_is_that_of_the_wished_rate(rate, x64):
    """Exactly, on the proposals that it is chosen from; a third have P = 0, others are equal."""
    rng = np.random.default_rng(0)
    for size in (3, 60, 999):
        log_score = np.where(np.arange(size) % 3 == 0, -np.inf, 4 * rng.normal(size=size))
        log_score[1::6] = log_score[1]
        logs = jnp.asarray(log_score), jnp.asarray(rng.normal(size=size))
        log_beta = jax.jit(choose_log_beta)(*logs, acceptance_rate=rate)
        assert acceptance(*logs, log_beta) == pytest.approx(rate, rel=1e-10)


def test_beta_of_weights_that_are_all_equal_or_far_apart(x64):
    zeros = jnp.zeros(5)
    assert float(choose_log_beta(zeros, zeros, acceptance_rate=0.2)) == pytest.approx(np.log(5))
    far = jnp.array([800.0, 0.0, -800.0, -1600.0])
    for rate in (0.1, 0.25, 0.3, 0.5, 0.6, 0.9):
        log_beta = choose_log_beta(far, jnp.zeros(4), acceptance_rate=rate)
        assert acceptance(far, jnp.zeros(4), log_beta) == pytest.approx(rate, rel=1e-12)


def test_a_rate_that_cannot_be_reached_accepts_all_that_can_be():
    log_score = jnp.array([0.5, -jnp.inf, -1.5, -jnp.inf])
    for rate in (0.5, 0.51, 1.0):
        log_beta = choose_log_beta(log_score, jnp.zeros(4), acceptance_rate=rate)
        assert float(log_beta) == -1.5
        assert acceptance(log_score, jnp.zeros(4), log_beta) == 0.5
    assert np.isnan(choose_log_beta(jnp.full(3, -jnp.inf), jnp.zeros(3), acceptance_rate=0.1))


def test_a_beta_from_some_proposals_has_about_its_rate_on_others():
    """Within 5 standard errors √(rate/n), of both halves."""
    log_score, log_q, *_ = proposals()
    rates = []
    for i in range(40):
        log_beta = choose_log_beta(log_score[i], log_q[i], acceptance_rate=0.2)
        rates.append(acceptance(log_score[-1 - i], log_q[-1 - i], log_beta))
    assert abs(np.mean(rates) - 0.2) < 5 * np.sqrt(2 * 0.2 / N / 40)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, np.nan, np.inf])
def test_a_rate_that_is_none_is_refused(rate):
    with refused("acceptance_rate is above 0 and at most 1"):
        choose_log_beta(jnp.zeros(2), jnp.zeros(2), acceptance_rate=rate)


@pytest.mark.parametrize("z_error", [0.1, np.inf])
def test_where_nothing_is_accepted_the_bound_is_one_whatever_z_is(z_error):
    log_score, log_q = jnp.full(3, -jnp.inf), jnp.zeros(3)
    log_z = Estimate(jnp.asarray(-1.0), jnp.asarray(z_error), jnp.asarray(9.0))
    rate, bound = estimate_rejection(log_score, log_q, log_beta=0.0, log_z=log_z)
    assert (float(rate.value), float(rate.std_error)) == (0, 0)
    assert (float(bound.value), float(bound.std_error)) == (1, 0)
    unknown = log_z._replace(value=-jnp.inf)
    assert jnp.isnan(estimate_rejection(log_score, log_q, log_beta=0.0, log_z=unknown).tv_bound[0])
