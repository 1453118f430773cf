"""The runs behind docs/noise.md: their gradient, their mean of parameters, their rate and level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tools.noise import training
from experiments.tools.noise.training import Plan
from experiments.tools.noise.world import SAMPLES, STRATA, bigram_task
from fjax import divergences, enumeration
from fjax.divergences import exact_divergence


@pytest.fixture
def task(x64):
    return bigram_task(0)


def plan(start=0.5, end=0.5, falls=0.0) -> Plan:
    return Plan(*(jnp.asarray(x) for x in (start, end, falls, 0.1)))


def run(task, steps, **given):
    return training.train(task, training.of_alpha, plan(**given), jax.random.key(0), steps=steps)


@pytest.mark.parametrize(("aim", "level"), [(training.of_alpha, 0.5), (training.of_beta, 5.0)])
def test_a_batch_has_the_gradient_of_the_divergence(task, aim, level):
    """Along the true one, over 2,000 batches: within five standard errors."""
    params = 0.5 * task.base
    divergence, log_p = aim(task, jnp.asarray(level))
    exact = enumeration.exact_gradient(
        task.log_prob_fn, params, task.space, log_p, divergence=divergence
    )

    def along(rng_key):
        gradient = jax.grad(training.batch_loss, argnums=2)(task, aim, params, rng_key, level)
        return jnp.vdot(gradient, exact) / jnp.vdot(exact, exact)

    found = jax.jit(jax.vmap(along))(jax.random.split(jax.random.key(0), 2000))
    assert abs(found.mean() - 1) < 5 * found.std() / np.sqrt(2000) < 0.5


def test_a_batch_is_of_the_policy_and_then_of_the_base(task):
    certain = jnp.where(jnp.arange(len(task.log_a)) == 7, 0.0, -jnp.inf)
    rows = training.draw(jax.random.key(0), certain, task.log_a)
    assert rows.shape == (SAMPLES,)
    assert (rows[~STRATA] == 7).all()
    assert not (rows[STRATA] == 7).all()


def test_the_mean_is_that_of_the_last_half(task):
    """At a constant rate and level a shorter run is the beginning of a longer one."""
    third, fourth = (run(task, steps).last for steps in (3, 4))
    np.testing.assert_allclose(run(task, 4).mean, (third + fourth) / 2, atol=1e-12)


def test_a_rate_that_falls_is_half_in_the_second_of_two_steps(task):
    first, constant, falling = run(task, 1).last, run(task, 2).last, run(task, 2, falls=1.0).last
    np.testing.assert_allclose(falling - first, (constant - first) / 2, atol=1e-12)


def test_the_level_stays_moves_and_stays(x64):
    moving = plan(start=1.0, end=3.0)
    found = [training.level(moving, x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(jnp.asarray(found), [1, 1, 2, 3, 3])


def test_every_run_is_where_its_axes_say(task, monkeypatch):
    """The second way, the falling rate, the last rate, the first seed."""
    monkeypatch.setattr(training, "SEEDS", 2)
    monkeypatch.setattr(training, "RATES", (0.05, 0.1))
    monkeypatch.setattr(training.train, "__kwdefaults__", {"steps": 4})
    ways = [(0.0, 0.0), (0.0, 0.5)]
    found = training.train_all(task, training.of_alpha, ways, (0, 1), seed=0)
    assert found.last.shape == (2, 2, 2, 2, *task.base.shape)
    key = jax.random.split(jax.random.key(0), 2)[0]
    given = task, training.of_alpha, plan(start=0.0, falls=1.0), key
    np.testing.assert_allclose(found.last[1, 1, 1, 0], training.train(*given).last, atol=1e-10)


def test_the_least_is_that_of_the_nearest_bigrams(task):
    """For forward KL they are known; for another f the gradient is 0 there."""
    nearest = jnp.maximum(task.nearest(task.log_p), -30.0)
    log_pi = task.log_prob_fn(nearest, *task.space)
    known = exact_divergence(log_pi, task.log_p, divergence=divergences.forward_kl())
    found = training.least(task, divergences.forward_kl(), steps=50)
    assert found == pytest.approx(float(known), abs=1e-4)
    hellinger = divergences.alpha_divergence(0.5)
    of_nearest = exact_divergence(log_pi, task.log_p, divergence=hellinger)
    assert 0 < training.least(task, hellinger) < float(of_nearest)


def test_a_cell_is_of_the_best_rate():
    found = np.array([[1.0, 3.0, 2.0], [0.1, 0.3, 0.2]])
    assert training.cell(found) == "0.2 ± 0.058"
