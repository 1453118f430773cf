"""Target distributions, as unnormalised log-scores ``log P(x)`` of samples.

A target is what the policy should become: p = P/Z. Only its log-score at the samples is ever needed; Z is
estimated (`fjax.estimate_log_z`) or, in a tiny space, summed (`fjax.enumeration.exact_log_z`).
"""

import jax.numpy as jnp

from fjax._typing import Array, Bool, Float


def pointwise(log_a: Float[Array, "*n"], satisfied: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """The base model restricted to what satisfies a constraint: P(x) = a(x) b(x), b(x) ∈ {0, 1}.

    Its normaliser is Z = E_a[b], the base rate of the constraint. KL(p‖a) = -log Z: of all distributions that
    satisfy the constraint always, p is the one closest to the base model.

    Args:
        log_a: log-probability of each sample under the base model, in nats.
        satisfied: b(x).

    Returns:
        ``log_a`` where satisfied, -inf elsewhere.

    Raises:
        ValueError: if the two are not of one shape.

    >>> pointwise(jnp.array([-1.0, -2.0]), jnp.array([True, False])).tolist()
    [-1.0, -inf]

    Source: Khalifa et al. 2021 (GDC, arXiv 2012.11635), section 2.
    """
    if log_a.shape != satisfied.shape:
        raise ValueError(f"log_a and satisfied describe the same samples, got {log_a.shape}, {satisfied.shape}.")
    return jnp.where(satisfied, log_a, -jnp.inf)
