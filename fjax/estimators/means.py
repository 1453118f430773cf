"""Means over samples, and what is one: entropy, KL to the base, the mixture."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjax._checks import as_mask, is_concrete, one_axis, one_number, same_shape
from fjax._numerics import count, ess_of, gather, keep, mean_and_error
from fjax.types import Array, Bool, Float, Int


class Estimate(NamedTuple):
    """A value with its uncertainty.

    Attributes:
        value: the estimate.
        std_error: its standard error; NaN from a single sample, inf where the value is.
        ess: effective sample size, between 1 and n: how many equally weighted samples the weighted
            ones are worth; 0 if all weights are 0. Where it is small neither of the others can be
            trusted.

    Scalar arrays; plain floats where they are computed on the host.
    """

    value: Float[Array, ""]
    std_error: Float[Array, ""]
    ess: Float[Array, ""]


def effective_sample_size(
    log_weights: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """(Σw)²/Σw², between 1 and n; 0 if every weight is 0.

    Args:
        log_weights: log w, up to a common constant.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    >>> float(effective_sample_size(jnp.zeros(5)))
    5.0
    >>> float(effective_sample_size(jnp.array([0.0, -jnp.inf, -jnp.inf])))
    1.0

    Source: Kong 1992; Owen 2013, section 9.3.
    """
    (log_weights,) = one_axis(log_weights=jax.lax.stop_gradient(log_weights))
    return ess_of(gather(keep(log_weights, as_mask(where, log_weights), -jnp.inf), axis_name))


def estimate_mean(
    values: Float[Array, "N"] | Int[Array, "N"] | Bool[Array, "N"],
    log_weights: Float[Array, "N"] | None = None,
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """E[values] over samples, self-normalised where they are weighted.

    Σ w v / Σ w with w = exp(log_weights): pass ``log_pi - log_q`` for a moment of the policy from
    samples of q, or ``log_score - log_q`` for a moment of the target, whose Z cancels. Weighted,
    the bias is of order 1/n.

    Args:
        values: one number a sample: a feature, a constraint as booleans or 0 and 1, log π - log a,
            ...; may be infinite or NaN where the weight is 0.
        log_weights: log importance weights up to a common constant; None means all equal.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        The estimate; NaN with an infinite error and no effective samples if every weight is 0.

    >>> estimate = estimate_mean(jnp.array([True, False, False, True]))
    >>> float(estimate.value), round(float(estimate.std_error), 3)
    (0.5, 0.289)

    Source: Owen 2013, section 9.2.
    """
    values, log_weights = one_axis(values=values, log_weights=log_weights)
    values, where = (
        gather(jax.lax.stop_gradient(values), axis_name),
        gather(as_mask(where, values), axis_name),
    )
    if log_weights is None:
        value, std_error = mean_and_error(values, where=where)
        return Estimate(value, std_error, count(values, where))
    log_weights = keep(gather(jax.lax.stop_gradient(log_weights), axis_name), where, -jnp.inf)
    ess = ess_of(log_weights)
    weights = jnp.where(ess > 0, jax.nn.softmax(jnp.where(ess > 0, log_weights, 0.0)), 0.0)
    values = jnp.where(weights > 0, values, 0.0)
    value = jnp.sum(weights * values)
    # With equal weights the last factor is n/(n - 1), and this the error of a plain mean.
    std_error = jnp.sqrt(
        jnp.sum(weights**2 * (values - value) ** 2) / (1 - 1 / jnp.maximum(ess, 1))
    )
    unbounded = (ess == 0) | jnp.isinf(value)
    return Estimate(
        jnp.where(ess > 0, value, jnp.nan), jnp.where(unbounded, jnp.inf, std_error), ess
    )


def estimate_kl_to_base(
    log_pi: Float[Array, "N"],
    log_a: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """KL(π‖a) = E_π[log π - log a]: how far the policy has moved from the base model, in nats.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_a: under the base model.
        log_q: under the sampling distribution; None means q = π, without bias; else
            self-normalised.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    >>> float(estimate_kl_to_base(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -2.0])).value)
    0.5

    Source: Korbak et al. 2022 (arXiv 2205.11275), section 2.
    """
    log_pi, log_a, log_q = one_axis(log_pi=log_pi, log_a=log_a, log_q=log_q)
    return estimate_mean(
        log_pi - log_a, None if log_q is None else log_pi - log_q, where=where, axis_name=axis_name
    )


def estimate_entropy(
    log_pi: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """H(π) = -E_π[log π], of whole sequences, in nats.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_q: under the sampling distribution; None means q = π, without bias; else
            self-normalised.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    >>> float(estimate_entropy(jnp.array([-1.0, -2.0])).value)
    1.5

    Source: Shannon 1948.
    """
    log_pi, log_q = one_axis(log_pi=log_pi, log_q=log_q)
    return estimate_mean(
        -log_pi, None if log_q is None else log_pi - log_q, where=where, axis_name=axis_name
    )


def log_mixture(
    log_pi: Float[Array, "*n"],
    log_a: Float[Array, "*n"],
    *,
    base_fraction: float | Float[Array, ""],
) -> Float[Array, "*n"]:
    """Log q of samples that come partly from the base model: q = (1 - ε) π + ε a.

    To be used as ``log_q`` for *all* samples, whichever of the two each came from (the balance
    heuristic). A policy that no longer covers the target makes P/π explode, rarely and without
    warning: log Z from its own samples is then far too small, with a small standard error. A share
    ε from the base bounds the weights: P/q ≤ P/(ε a), which is 1/ε for a constraint, and π/q ≤ 1/(1
    - ε).

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_a: under the base model.
        base_fraction: ε, the share of the samples that were drawn from the base model; 0 gives
            ``log_pi``.

    Raises:
        ValueError: if the share is not in [0, 1], or the shapes differ.

    >>> log_pi, log_a = jnp.log(jnp.array([0.1])), jnp.log(jnp.array([0.5]))
    >>> round(float(jnp.exp(log_mixture(log_pi, log_a, base_fraction=0.25))[0]), 6)
    0.2

    Source: Hesterberg 1995 (defensive mixtures); Veach and Guibas 1995; Owen and Zhou 2000.
    """
    log_pi, log_a = same_shape(log_pi=log_pi, log_a=log_a)
    one_number(base_fraction=base_fraction)
    if is_concrete(base_fraction) and not 0 <= base_fraction <= 1:
        raise ValueError(f"base_fraction is a share between 0 and 1, got {base_fraction}.")
    of_policy, of_base = (
        jnp.log(jnp.asarray(share, log_pi.dtype)) for share in (1 - base_fraction, base_fraction)
    )
    return jnp.logaddexp(of_policy + log_pi, of_base + log_a)
