"""Targets against what they are by definition, summed over a small space."""

import jax.numpy as jnp
import numpy as np
import pytest

from fjax import divergences, enumeration, targets
from tests.cases import refused, world


def test_pointwise_is_the_base_model_given_the_constraint(x64):
    """p = a(x | b), Z = E_a[b], KL(p‖a) = -log Z, and KL(p‖π) ≥ -log E_π[b] for every π."""
    small = world()
    log_a, satisfied = small.log_q, jnp.isfinite(small.log_p_hard)
    log_score = targets.pointwise(log_a, satisfied)
    log_z = enumeration.exact_log_z(log_score)
    assert float(jnp.exp(log_z)) == pytest.approx(float(jnp.exp(log_a)[satisfied].sum()), rel=1e-12)

    log_p = log_score - log_z
    given = np.where(satisfied, np.exp(log_a), 0)
    np.testing.assert_allclose(jnp.exp(log_p), given / given.sum(), rtol=1e-12)

    kl = divergences.forward_kl()
    from_base = divergences.exact_divergence(log_a, log_p, divergence=kl)
    assert float(from_base) == pytest.approx(-float(log_z), rel=1e-12)
    bound = -jnp.log(jnp.exp(small.log_pi)[satisfied].sum())
    assert float(divergences.exact_divergence(small.log_pi, log_p, divergence=kl)) > float(bound)


def test_pointwise_refuses_what_would_broadcast():
    with refused(r"\(3,\), \(1,\)"):
        targets.pointwise(jnp.zeros(3), jnp.ones(1, bool))
