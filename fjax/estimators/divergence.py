"""How far a policy is from the target, by any f; and which of two distributions is nearer."""

import jax
import jax.numpy as jnp

from fjax._checks import as_mask, made, one_axis
from fjax._numerics import continued, gather, in_range, mean_and_error, weighted
from fjax.divergences import FDivergence
from fjax.surrogates import score_weights
from fjax.types import Array, Bool, Float, Int

from .log_z import estimate_log_z
from .means import Estimate, effective_sample_size, estimate_mean


def estimate_divergence(
    log_pi: Float[Array, "N"],
    log_p: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    divergence: FDivergence,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """D_f(π‖p) from samples of q, which must cover both π and p.

    D_f(π‖p) = E_q[(π/q) f(t)/t] with t = π/p, formed as (p/q) f(t) where t < 1 so that no ∞·0
    arises; the term is (π/q) f'(∞) where p = 0. Without bias given the true log p. Good for forward
    KL too when few samples lie in the support of p: the others are worth exactly 0, and ``ess``
    says how few there were.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_p: under the normalised target; -inf is allowed. With a log Z estimated from the same
            samples use `estimate_divergence_from_score`, whose standard error knows of it.
        log_q: under the sampling distribution, which may be neither π nor p; None means q = π.
        divergence: which f.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        The estimate; ``ess`` is the smaller of those of the weights p/q and π/q.

    >>> from fjax import total_variation
    >>> log_pi, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    >>> float(estimate_divergence(log_pi, log_p, divergence=total_variation()).value)
    0.5

    Source: Go et al. 2023, equation 1 and appendix on metrics.
    """
    made(divergence)
    log_pi, log_p, log_q, where = _together(
        axis_name, where, log_pi=log_pi, log_p=log_p, log_q=log_q
    )
    value, std_error = mean_and_error(_terms(log_pi, log_p, log_q, divergence), where=where)
    return Estimate(value, std_error, _smaller_ess(log_pi, log_p, log_q, where))


def estimate_divergence_from_score(
    log_pi: Float[Array, "N"],
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    divergence: FDivergence,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """D_f(π‖p) for a target known up to Z, which is estimated from the same samples.

    Consistent, with a bias of order 1/n. The standard error is that of the whole: a sample's
    influence is g - D + C·(w - 1), where g is its term, w = P/(qẐ), and C = dD/dlog Z =
    E_q[(π/q)(f'(t) - f(t)/t)].

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_score: unnormalised log P(x); -inf is allowed.
        log_q: under the sampling distribution; None means q = π.
        divergence: which f.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        The estimate; NaN with an infinite error and no effective samples if none of them has P > 0.

    >>> from fjax import forward_kl
    >>> log_pi, log_score = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.0]))
    >>> estimate = estimate_divergence_from_score(log_pi, log_score, divergence=forward_kl())
    >>> round(float(estimate.value), 6)                    # KL(p‖π) = -log π(b), b being half
    0.693147

    Source: delta method; Owen 2013, section 9.2.
    """
    made(divergence)
    log_pi, log_score, log_q, where = _together(
        axis_name, where, log_pi=log_pi, log_score=log_score, log_q=log_q
    )
    log_z = estimate_log_z(log_score, log_q, where=where).value
    unknown = jnp.isneginf(log_z)
    log_p = log_score - jnp.where(unknown, 0.0, log_z)
    terms = _terms(log_pi, log_p, log_q, divergence)
    # Off the support of p the two summands of C are equal, and for reverse KL both infinite.
    off_support = jnp.isneginf(log_p)
    weights = score_weights(log_pi, log_p, log_q, divergence=divergence)
    slopes = jnp.where(off_support, 0.0, weights - jnp.where(off_support, 0.0, terms))
    slope, _ = mean_and_error(slopes, where=where)
    value, _ = mean_and_error(terms, where=where)
    _, std_error = mean_and_error(terms + slope * (jnp.exp(log_p - log_q) - 1), where=where)
    std_error = jnp.where(unknown | jnp.isinf(value), jnp.inf, std_error)
    return Estimate(
        jnp.where(unknown, jnp.nan, value), std_error, _smaller_ess(log_pi, log_p, log_q, where)
    )


def estimate_proposal_gain(
    log_pi: Float[Array, "N"],
    log_proposal: Float[Array, "N"],
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """KL(p‖r) - KL(p‖π): above 0 the policy π is nearer to the target than r.

    Then π should take the place of r, the proposal. The difference is E_p[log π - log r], estimated
    by self-normalised weights P/q: neither Z nor the entropy of p is needed. Weighted, the bias is
    of order 1/n.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_proposal: under the proposal r.
        log_score: unnormalised log P(x); -inf is allowed.
        log_q: under what the samples are from: r itself, or with a share of the base model
            `log_mixture`.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        The estimate; 0 with an infinite error and no effective samples if none of them has P > 0,
        for then nothing speaks for a change.

    >>> log_r, log_score = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.5, 0.0]))
    >>> log_pi = jnp.log(jnp.array([0.75, 0.25]))
    >>> round(float(estimate_proposal_gain(log_pi, log_r, log_score, log_r).value), 6)  # log 3/2
    0.405465

    Source: Go et al. 2023, algorithm 1 (the adaptive proposal of DPG, Parshakova et al. 2019);
    Owen 2013, section 9.2.
    """
    log_pi, log_proposal, log_score, log_q = one_axis(
        log_pi=log_pi, log_proposal=log_proposal, log_score=log_score, log_q=log_q
    )
    estimate = estimate_mean(
        log_pi - log_proposal, log_score - log_q, where=where, axis_name=axis_name
    )
    return estimate._replace(value=jnp.where(estimate.ess > 0, estimate.value, 0.0))


def _together(axis_name, where, **arrays) -> tuple[Array, Array, Array, Array | None]:
    """Checked, stopped, q = π filled in, and the samples of all devices in one."""
    log_pi, target, log_q = jax.lax.stop_gradient(one_axis(**arrays))
    where = as_mask(where, log_pi)
    log_pi, target, log_q = (
        gather(x, axis_name) for x in (log_pi, target, log_pi if log_q is None else log_q)
    )
    return log_pi, target, log_q, gather(where, axis_name)


def _terms(log_pi, log_p, log_q, divergence):
    """(p/q) f(t) or (π/q) f(t)/t, whichever has its digits; infinite only where it is."""
    # Neither has mass: the sample says nothing about D_f (and log_t would be inf - inf).
    nothing = jnp.isneginf(log_pi) & jnp.isneginf(log_p)
    log_t = jnp.where(nothing, 0.0, log_pi - log_p)
    f, f_exponent = continued(divergence.generator, log_t)
    ratio, ratio_exponent = continued(divergence.integrand, log_t)
    good_f, good_ratio = in_range(f) & (f_exponent == 0), in_range(ratio) & (ratio_exponent == 0)
    by_p = jnp.where(log_t < 0, good_f | ~good_ratio, good_f & ~good_ratio)
    terms = jnp.where(
        by_p,
        weighted(f, f_exponent + log_p - log_q),
        weighted(ratio, ratio_exponent + log_pi - log_q),
    )
    return jnp.where(nothing, 0.0, terms)


def _smaller_ess(log_pi, log_p, log_q, where):
    return jnp.minimum(
        effective_sample_size(log_p - log_q, where=where),
        effective_sample_size(log_pi - log_q, where=where),
    )
