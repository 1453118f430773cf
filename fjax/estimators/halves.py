"""How far a policy is from a target of which there are samples: no weight exceeds 2.

Importance weights P/q are only as good as q: where π no longer covers p, and too few samples of the
base model happen to be there, every figure from them is wrong, its standard error included. Not so
from samples of p itself, where they can be drawn (`fjax.rejection`): half of p and half of π are
samples of q = (p + π)/2, which covers both, so that p/q and π/q are at most 2.

The log Z that p needs is an estimate too. Each error here includes its own.
"""

import jax
import jax.numpy as jnp

from fjax._checks import made, one_axis
from fjax._numerics import mean_and_error
from fjax.divergences import FDivergence
from fjax.surrogates import score_weights
from fjax.types import Array, Float

from .divergence import _smaller_ess, _terms
from .means import Estimate, log_mixture


def estimate_divergence_from_halves(
    log_pi: Float[Array, "N"],
    log_score: Float[Array, "N"],
    target_log_pi: Float[Array, "M"],
    target_log_score: Float[Array, "M"],
    log_z: Estimate,
    *,
    divergence: FDivergence,
    log_z_shares: Float[Array, "M"] | None = None,
) -> Estimate:
    """D_f(π‖p) from samples of π and samples of p, each half of q = (p + π)/2.

    D_f(π‖p) = ½ E_π[g] + ½ E_p[g] with g = (π/q) f(t)/t and t = π/p, whatever the numbers of
    samples are. Without bias given the true log Z. The standard error adds that of log Z times
    dD/dlog Z = E_q[(π/q) f'(t) - g π/(p + π)], where q moves with Z as well.

    Args:
        log_pi: log-probabilities under the policy of its own samples, in nats.
        log_score: unnormalised log P(x) of them; -inf is allowed.
        target_log_pi: under the policy, of the samples of p.
        target_log_score: log P of these.
        log_z: the normaliser, with its error.
        divergence: which f.
        log_z_shares: P/(m a Z) of each sample of p, where these were accepted among the m samples
            of the base model that log Z is from: what their error and Z's have in common. None
            counts the two as independent, as they are for a constraint.

    Returns:
        The estimate; ``ess`` is the smaller of those of the weights p/q and π/q, all samples
        together.

    Raises:
        ValueError: if the samples of either are not one number each, or there are none.

    >>> from fjax import total_variation
    >>> log_pi, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([1.0, 0.0]))
    >>> estimate = estimate_divergence_from_halves(             # two of π, one of p
    ...     log_pi, log_p, log_pi[:1], log_p[:1], Estimate(0.0, 0.0, 1.0),
    ...     divergence=total_variation(),
    ... )
    >>> float(estimate.value)
    0.5

    Source: Owen and Zhou 2000 (deterministic mixtures); Owen 2013, sections 9.8 and 9.2.
    """
    made(divergence)
    of_pi = _one_each(log_pi=log_pi, log_score=log_score)
    *of_p, shares = _one_each(
        target_log_pi=target_log_pi, target_log_score=target_log_score, log_z_shares=log_z_shares
    )
    all_log_pi, all_log_score = map(jnp.concatenate, zip(of_pi, of_p, strict=True))
    terms, slopes = _terms_and_slopes(all_log_pi, all_log_score, log_z.value, divergence)
    n = len(log_pi)
    (value, error), (target_value, target_error) = map(mean_and_error, (terms[:n], terms[n:]))
    slope = (slopes[:n].mean() + slopes[n:].mean()) / 2
    value = (value + target_value) / 2
    spread = jnp.hypot(error, target_error) / 2
    std_error = _with_log_z(spread, slope, log_z, terms[n:] / 2, shares)
    return Estimate(
        value,
        jnp.where(jnp.isinf(value), jnp.inf, std_error),
        _ess(of_pi, of_p, log_z.value),
    )


def estimate_forward_kl_from_target(
    target_log_pi: Float[Array, "M"],
    target_log_score: Float[Array, "M"],
    log_z: Estimate,
    *,
    log_z_shares: Float[Array, "M"] | None = None,
) -> Estimate:
    """KL(p‖π) = E_p[log P - log π] - log Z, a plain mean over samples of p.

    With log a in the place of log π it is KL(p‖a), how much the target asks for.

    Args:
        target_log_pi: log-probabilities of samples of p under the policy, in nats.
        target_log_score: unnormalised log P of them.
        log_z: the normaliser, with its error.
        log_z_shares: as in `estimate_divergence_from_halves`.

    Returns:
        The estimate; ``ess`` is the number of samples.

    Raises:
        ValueError: if they are not one number each, or there are none.

    >>> log_pi, log_score = jnp.log(jnp.array([0.25, 0.25])), jnp.log(jnp.array([0.1, 0.1]))
    >>> log_z = Estimate(jnp.log(0.2), 0.0, 2.0)
    >>> round(float(estimate_forward_kl_from_target(log_pi, log_score, log_z).value), 6)   # log 2
    0.693147

    Source: Khalifa et al. 2021, section 3; delta method.
    """
    log_pi, log_score, shares = _one_each(
        target_log_pi=target_log_pi, target_log_score=target_log_score, log_z_shares=log_z_shares
    )
    mean, std_error = mean_and_error(log_score - log_pi)
    std_error = _with_log_z(std_error, -1.0, log_z, log_score - log_pi, shares)
    infinite = jnp.isinf(mean)
    return Estimate(mean - log_z.value, jnp.where(infinite, jnp.inf, std_error), _count(log_score))


def estimate_target_entropy(
    target_log_score: Float[Array, "M"],
    log_z: Estimate,
    *,
    log_z_shares: Float[Array, "M"] | None = None,
) -> Estimate:
    """H(p) = log Z - E_p[log P] in nats: how varied the target is, beside the policy's entropy.

    Args:
        target_log_score: unnormalised log P of samples of p.
        log_z: the normaliser, with its error.
        log_z_shares: as in `estimate_divergence_from_halves`.

    Returns:
        The estimate; ``ess`` is the number of samples.

    Raises:
        ValueError: if they are not one number each, or there are none.

    >>> log_score, log_z = jnp.log(jnp.array([0.1, 0.1])), Estimate(jnp.log(0.2), 0.0, 2.0)
    >>> round(float(estimate_target_entropy(log_score, log_z).value), 6)                  # log 2
    0.693147

    Source: elementary; delta method.
    """
    log_score, shares = _one_each(target_log_score=target_log_score, log_z_shares=log_z_shares)
    mean, std_error = mean_and_error(log_score)
    std_error = _with_log_z(std_error, 1.0, log_z, -log_score, shares)
    return Estimate(log_z.value - mean, std_error, _count(log_score))


def _one_each(**arrays: Array | None) -> tuple:
    """Checked and stopped."""
    found = jax.lax.stop_gradient(one_axis(**arrays))
    if len(found[0]) == 0:
        given = [name for name, x in arrays.items() if x is not None]
        raise ValueError(
            f"{' and '.join(given)} have no sample in them: there must be one at least."
        )
    return found


def _count(x: Array) -> Array:
    return jnp.asarray(len(x), x.dtype)


def _terms_and_slopes(log_pi, log_score, log_z, divergence):
    """Of each sample, g = (π/q) f(t)/t, and how g moves with log Z."""
    log_p = log_score - log_z
    log_q = log_mixture(log_pi, log_p, base_fraction=0.5)
    terms = _terms(log_pi, log_p, log_q, divergence)
    weights = score_weights(log_pi, log_p, log_q, divergence=divergence)
    # Off the support of p, g does not move, and for reverse KL it is infinite.
    off_support = jnp.isneginf(log_p)
    of_policy = jnp.exp(log_pi - log_q) / 2  # π/(p + π)
    return terms, jnp.where(
        off_support, 0.0, weights - jnp.where(off_support, 0.0, terms) * of_policy
    )


def _with_log_z(std_error, slope, log_z, values, shares):
    """The error of a mean over samples of p and of slope · log Z together."""
    variance = std_error**2 + (slope * log_z.std_error) ** 2
    if shares is not None:
        # of n⁻¹ Σ values and Σ shares, both over the same n samples
        common = jnp.sum((values - values.mean()) * (shares - shares.mean())) / (len(shares) - 1)
        variance = variance + 2 * slope * common
    return jnp.sqrt(jnp.maximum(variance, 0.0))


def _ess(of_pi, of_p, log_z):
    """Of all samples, each of π with the weight ½ over their number, and so each of p."""
    log_pi, log_score = (jnp.concatenate(pair) for pair in zip(of_pi, of_p, strict=True))
    log_p = log_score - log_z
    each = jnp.concatenate([jnp.full_like(x[0], jnp.log(2.0 * len(x[0]))) for x in (of_pi, of_p)])
    log_q = log_mixture(log_pi, log_p, base_fraction=0.5) + each
    return _smaller_ess(log_pi, log_p, log_q, None)
