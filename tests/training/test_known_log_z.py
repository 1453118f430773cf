"""A log Z that is known: the tuner takes it, changes nothing of it, and needs no sample to begin."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fjax import divergences, estimators
from fjax.training import Rollout, fdpg
from tests.cases import refused, world


def step(small, log_score, log_q, **options):
    """One step down the gradient itself, on the whole space: the gradient, the state, the info."""
    tuner = fdpg(
        small.log_prob_fn,
        optax.sgd(1.0),
        divergence=divergences.jensen_shannon(),
        baseline=0.0,
        **options,
    )
    contexts = options.get("num_contexts")
    rows = [
        jnp.broadcast_to(x, (1, *x.shape)) if contexts else x
        for x in (*small.space, log_q, log_score)
    ]
    rollout = Rollout(*rows, contexts=jnp.array([contexts - 1]) if contexts else None)
    state = tuner.init(small.params)
    after, info = jax.jit(tuner.update)(state, rollout)
    return state.params - after.params, state, after, info


@pytest.mark.parametrize("num_contexts", [None, 3])
def test_scores_are_normalised_by_it_and_by_no_sample(num_contexts, x64):
    """Samples of the space, each once, weighted by 1/7 each: the gradient is exact, also where the
    mean of P/q over them is not Z."""
    small = world()
    log_z = estimators.known_log_z(-1.5)
    uniform = jnp.full(7, -np.log(7))
    found, before, after, info = step(
        small, small.log_p - 1.5, uniform, log_z=log_z, num_contexts=num_contexts
    )
    exact = small.exact_gradient(small.log_p, divergences.jensen_shannon())
    np.testing.assert_allclose(found, exact, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, after.log_z, before.log_z)
    assert float(info.log_z.value) == -1.5
    assert float(info.log_z.std_error) == 0
    assert np.isinf(info.log_z.ess)


def test_without_a_sample_of_the_support_it_is_known_all_the_same(x64):
    """As off the support of p every sample is pushed away by f'(∞), whose mean is 0."""
    small = world()
    nothing, *_, info = step(
        small, jnp.full(7, -jnp.inf), jnp.full(7, -np.log(7)), log_z=estimators.known_log_z()
    )
    np.testing.assert_allclose(nothing, 0, atol=1e-12)
    assert bool(info.finite)
    assert np.isfinite(info.divergence.value)


def test_it_is_in_the_precision_of_the_state():
    estimate = estimators.known_log_z().estimate(estimators.init_log_mean(jnp.float32))
    assert {x.dtype.name for x in estimate} == {"float32"}


@pytest.mark.parametrize("value", [-np.inf, np.nan, np.inf])
def test_what_is_no_number_is_refused(value):
    with refused(f"must be a finite number, got {value}"):
        estimators.known_log_z(value)


def test_several_numbers_are_refused():
    with refused("value must be one number"):
        estimators.known_log_z(jnp.zeros(2))
