"""Quasi-rejection sampling: from a model to samples nearer the target, at a known cost.

A sample x of q is accepted with probability min(1, P(x)/(β q(x))). The accepted
ones are of p_β ∝ min(P, βq): exactly of p once β ≥ max P/q, and before that within TV(p, p_β) ≤ 1 -
Z_β/Z, where Z_β = Σ min(P, βq) and Z_β/β is the acceptance rate. A larger β comes closer to p and
costs more. For a constraint P = a·b every accepted sample satisfies it, whatever β is.

Source: Eikema et al. 2022 (QRS, arXiv 2112.05702).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjax._checks import is_concrete, one_axis, one_number, same_shape
from fjax._numerics import gather, mean_and_error
from fjax.estimators import Estimate, effective_sample_size
from fjax.types import Array, Float, PRNGKeyArray

__all__ = [
    "RejectionEstimate",
    "accept",
    "choose_log_beta",
    "estimate_rejection",
    "log_acceptance",
]


class RejectionEstimate(NamedTuple):
    """What a β costs and what it is worth.

    Attributes:
        acceptance_rate: Z_β/β, accepted samples a proposal.
        tv_bound: 1 - Z_β/Z ≥ TV(p, p_β).
    """

    acceptance_rate: Estimate
    tv_bound: Estimate


def log_acceptance(
    log_score: Float[Array, "*n"], log_q: Float[Array, "*n"], *, log_beta: float | Float[Array, ""]
):
    """Log min(1, P/(βq)) of each proposal.

    Args:
        log_score: unnormalised log P(x) of samples of q, in nats; -inf is allowed.
        log_q: their log-probabilities under q.
        log_beta: log β.

    Raises:
        ValueError: if the shapes differ, or log β is not one number.

    >>> log_acceptance(jnp.array([-1.0, -jnp.inf]), jnp.array([-2.0, -2.0]), log_beta=0.0).tolist()
    [0.0, -inf]

    Source: Eikema et al. 2022, algorithm 1.
    """
    one_number(log_beta=log_beta)
    log_score, log_q = same_shape(log_score=log_score, log_q=log_q)
    return jnp.minimum(log_score - log_q - log_beta, 0.0)


def accept(
    rng_key: PRNGKeyArray,
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"],
    *,
    log_beta: float | Float[Array, ""],
):
    """Which of the proposals to keep: an independent coin of `log_acceptance` for each.

    Args:
        rng_key: of the coins.
        log_score: unnormalised log P(x) of samples of q, in nats.
        log_q: their log-probabilities under q.
        log_beta: log β.

    Returns:
        Booleans ``[N]``.

    Raises:
        ValueError: see `log_acceptance`.

    >>> accept(jax.random.key(0), jnp.array([0.0, -jnp.inf]), jnp.zeros(2), log_beta=0.0).tolist()
    [True, False]

    Source: Eikema et al. 2022, algorithm 1.
    """
    log_score, log_q = one_axis(log_score=log_score, log_q=log_q)
    coins = jax.random.uniform(rng_key, log_q.shape, log_q.dtype)
    return jnp.log(coins) < log_acceptance(log_score, log_q, log_beta=log_beta)


def estimate_rejection(
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"],
    *,
    log_beta: float | Float[Array, ""],
    log_z: Estimate | None = None,
    axis_name: str | None = None,
) -> RejectionEstimate:
    """Acceptance rate and bound on TV(p, p_β) from proposals, accepted or not.

    Z_β is a mean of bounded numbers and always known well. Z is not: where q does not cover the
    target, its own samples show too small a Z, and so too small a bound. Give ``log_z`` from
    samples that cover it, `fjax.estimators.log_mixture` of proposals and samples of the base model,
    say.

    Args:
        log_score: unnormalised log P(x) of samples of q, in nats.
        log_q: their log-probabilities under q.
        log_beta: log β.
        log_z: an estimate of log Z, whose error is counted as independent of that of Z_β; None
            means from these samples.
        axis_name: mapped axis over which the samples are spread.

    Returns:
        A `RejectionEstimate`; where no sample has P > 0, the bound is NaN without ``log_z``, since
        Z is unknown, and 1 ± 0 with it. Otherwise its standard error is that of a ratio (delta
        method).

    Raises:
        ValueError: if the shapes are not one number a sample, or log β is not one number.

    >>> estimate = estimate_rejection(jnp.log(jnp.array([2.0, 1.0])), jnp.zeros(2), log_beta=0.0)
    >>> float(estimate.acceptance_rate.value), round(float(estimate.tv_bound.value), 6)
    (1.0, 0.333333)

    Source: Eikema et al. 2022, section 3.
    """
    log_score, log_q = (gather(x, axis_name) for x in one_axis(log_score=log_score, log_q=log_q))
    rate = jnp.exp(log_acceptance(log_score, log_q, log_beta=log_beta))
    value, error = mean_and_error(rate)
    acceptance = Estimate(value, error, jnp.asarray(log_q.shape[0], log_q.dtype))
    if log_z is not None:
        ratio = jnp.exp(jnp.log(value) + log_beta - log_z.value)
        # Where nothing is accepted, 0/0 would be NaN: the bound is 1 then, whatever Z is.
        some = value > 0
        relative = jnp.hypot(error / jnp.where(some, value, 1.0), log_z.std_error)
        spread = ratio * jnp.where(some, relative, 0.0)
        return RejectionEstimate(acceptance, Estimate(1 - ratio, spread, log_z.ess))
    log_weights = log_score - log_q
    ess = effective_sample_size(log_weights)
    top = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isneginf(top), 0.0, top))
    kept = jnp.exp(jnp.minimum(log_weights, log_beta) - jnp.where(jnp.isneginf(top), 0.0, top))
    ratio = kept.mean() / weights.mean()
    _, ratio_error = mean_and_error((kept - ratio * weights) / weights.mean())
    return RejectionEstimate(acceptance, Estimate(1 - ratio, ratio_error, ess))


def choose_log_beta(
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"],
    *,
    acceptance_rate: float | Float[Array, ""],
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The log β at which a given share of the proposals is accepted.

    The rate (1/n) Σ min(1, w/β) with w = P/q falls as β rises, and is solved exactly: with the j
    largest weights accepted for sure, β = Σ_{i>j} w_i/(n·rate - j) where that lies between
    w_{j+1} and w_j. Where no β reaches the rate, since P = 0 in too many proposals, it is the
    largest that accepts all the others.

    Args:
        log_score: unnormalised log P(x) of samples of q, in nats; -inf is allowed.
        log_q: their log-probabilities under q.
        acceptance_rate: share of the proposals to keep, above 0 and at most 1.
        axis_name: mapped axis over which the samples are spread; all count together.

    Returns:
        log β; NaN if no proposal has P > 0. Chosen from n proposals, it accepts about the same
        share of further ones, to within √(rate/n).

    Raises:
        ValueError: if the rate is out of range, or the shapes are not one number a sample.

    >>> log_score = jnp.log(jnp.array([4.0, 1.0, 1.0, 0.0]))
    >>> float(jnp.exp(choose_log_beta(log_score, jnp.zeros(4), acceptance_rate=0.5)))  # 1 + ½ + ½
    2.0

    Source: Eikema et al. 2022, section 3, for β as a choice of the rate; the rest is elementary.
    """
    one_number(acceptance_rate=acceptance_rate)
    if is_concrete(acceptance_rate) and not 0 < acceptance_rate <= 1:
        raise ValueError(f"acceptance_rate is above 0 and at most 1, got {acceptance_rate}.")
    log_score, log_q = (gather(x, axis_name) for x in one_axis(log_score=log_score, log_q=log_q))
    log_weights = jnp.sort(log_score - log_q, descending=True)
    wanted = jnp.asarray(acceptance_rate, log_q.dtype) * log_q.shape[0]
    possible = ~jnp.isneginf(log_weights)
    log_tails = jax.lax.cumlogsumexp(log_weights, reverse=True)  # each with all below it
    log_below = jnp.append(log_tails[1:], -jnp.inf)
    # How many are accepted at β = w_i; differences where P = 0 are replaced before they are NaN.
    rest = jnp.exp(jnp.where(possible, log_below, 0.0) - jnp.where(possible, log_weights, 0.0))
    accepted = jnp.arange(1, len(log_weights) + 1, dtype=log_q.dtype) + rest
    sure = (possible & (accepted < wanted)).sum()
    left = jnp.where(sure < possible.sum(), wanted - sure.astype(log_q.dtype), 1.0)
    last = jnp.where(possible, log_weights, jnp.inf).min()
    solved = log_tails[jnp.minimum(sure, len(log_weights) - 1)] - jnp.log(left)
    chosen = jnp.where(sure < possible.sum(), solved, last)
    return jnp.where(possible.any(), chosen, jnp.nan)
