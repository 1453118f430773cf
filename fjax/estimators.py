"""Estimates from samples, each with a standard error and an effective sample size beside the value.

Samples come from q (``log_q``), or from the policy itself where ``log_q`` is None. Everything is
formed in log space; nothing here is meant to be differentiated (see `fjax.surrogates` for
gradients), so all inputs are stopped.

Satisfaction, moments and rewards are means over samples: `estimate_mean`. Entropy and KL(π‖a) have
their own names. All divergences between policy and target are one function, `estimate_divergence`,
whatever f and wherever the samples are from; `estimate_divergence_from_score` is the same for a
target known up to Z.

Source: Owen 2013, Monte Carlo theory, methods and examples, chapter 9; Go et al. 2023 (f-DPG),
appendix on metrics.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax._checks import as_mask, float_dtype, is_concrete, made, one_axis, one_number, same_shape
from fjax._numerics import (
    continued,
    count,
    ess_of,
    gather,
    in_range,
    keep,
    mean_and_error,
    weighted,
)
from fjax.divergences import FDivergence
from fjax.surrogates import score_weights
from fjax.types import Array, Bool, Float, Int

__all__ = [
    "Estimate",
    "LogMean",
    "RunningLogMean",
    "effective_sample_size",
    "estimate_divergence",
    "estimate_divergence_from_score",
    "estimate_entropy",
    "estimate_kl_to_base",
    "estimate_log_z",
    "estimate_mean",
    "init_log_mean",
    "log_mean_estimate",
    "log_mixture",
    "running_log_mean",
    "update_log_mean",
]


class Estimate(NamedTuple):
    """A value with its uncertainty.

    Attributes:
        value: the estimate.
        std_error: its standard error; NaN from a single sample, inf where the value is.
        ess: effective sample size, between 1 and n: how many equally weighted samples the weighted
            ones are worth; 0 if all weights are 0. Where it is small neither of the others can be
            trusted.
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


def estimate_log_z(
    log_score: Float[Array, "N"],
    log_q: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """The normaliser of the target by importance sampling: log Z ≈ log mean P(x)/q(x), x ~ q.

    Z itself is estimated without bias by any q that covers the target; its logarithm has a bias of
    order 1/n. The standard error is that of Z divided by Z (delta method).

    Args:
        log_score: unnormalised log P(x) in nats; -inf is allowed.
        log_q: log-probabilities under the sampling distribution.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        Value -inf with an infinite error if no sample has P > 0.

    >>> estimate = estimate_log_z(jnp.log(jnp.array([0.5, 0.0])), jnp.log(jnp.array([0.5, 0.5])))
    >>> round(float(jnp.exp(estimate.value)), 6)
    0.5

    Source: Go et al. 2023, section 3.3; Owen 2013, section 9.1.
    """
    log_score, log_q = one_axis(log_score=log_score, log_q=log_q)
    return log_mean_estimate(
        update_log_mean(
            init_log_mean(log_q.dtype), log_score - log_q, where=where, axis_name=axis_name
        )
    )


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
    """Log q of samples that come partly from the policy and partly from the base model: q = (1 - ε)
    π + ε a.

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

    >>> round(float(jnp.exp(log_mixture(jnp.log(jnp.array([0.1])), jnp.log(jnp.array([0.5])), base_fraction=0.25))[0]), 6)
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


class LogMean(NamedTuple):
    """A mean of exp(log_weights) over everything seen so far: sums in units of the largest weight,
    which is kept as its log.

    Attributes:
        largest: the largest log weight; -inf before the first that is not 0.
        sums: Σ w/w_max; Σ (w/w_max)², for the standard error and the effective sample size; how
            many there were.
        lost: what rounding has kept out of each sum, to go in with the next weights: in float32
            too, the millionth batch counts as the first did.
    """

    largest: Float[Array, ""]
    sums: Float[Array, "3"]
    lost: Float[Array, "3"]

    @property
    def count(self) -> Float[Array, ""]:
        """How many weights there were."""
        return self.sums[..., 2] + self.lost[..., 2]


def init_log_mean(dtype: DTypeLike = float) -> LogMean:
    """Nothing seen yet; in JAX's default precision, which is float32 unless 64-bit mode is on.

    >>> float(init_log_mean().count)
    0.0

    Source: Go et al. 2023, algorithm 1, in log space.
    """
    dtype = float_dtype(jnp.zeros((), dtype))
    # Two arrays of zeros rather than one used twice: the state is donated, and a buffer can be
    # given away only once.
    return LogMean(jnp.array(-jnp.inf, dtype), jnp.zeros(3, dtype), jnp.zeros(3, dtype))


def update_log_mean(
    state: LogMean,
    log_weights: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> LogMean:
    """Takes in more weights; -inf (weight zero) counts as a sample.

    Args:
        state: of what has been seen so far.
        log_weights: log P/q, of samples of any q that covers the target; q may differ from call to
            call.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    >>> state = update_log_mean(init_log_mean(), jnp.log(jnp.array([1.0, 3.0])))
    >>> round(float(jnp.exp(log_mean_estimate(state).value)), 5)
    2.0

    Source: Go et al. 2023, algorithm 1, in log space.
    """
    (log_weights,) = one_axis(log_weights=jax.lax.stop_gradient(log_weights))
    one_number(**{"the log Z of state": state.largest})
    # In the dtype of the state, which must not change from step to step: it is donated, and carried
    # through loops.
    where, log_weights = (
        gather(as_mask(where, log_weights), axis_name),
        gather(log_weights, axis_name),
    )
    log_weights = keep(log_weights, where, -jnp.inf).astype(state.largest.dtype)
    largest = jnp.maximum(state.largest, log_weights.max(initial=-jnp.inf))
    weights = jnp.exp(log_weights - _unit(largest))
    batch = jnp.stack([weights.sum(), (weights**2).sum(), count(weights, where)])
    # Exactly 1 unless there is a new largest weight.
    change = jnp.exp(state.largest - _unit(largest))
    change = jnp.stack([change, change**2, jnp.ones_like(change)])
    return LogMean(largest, *_add(state.sums * change, batch + state.lost * change))


def log_mean_estimate(state: LogMean) -> Estimate:
    """The log-mean log (Σw/n), the standard error of the mean relative to it, and the effective
    sample size.

    >>> float(log_mean_estimate(init_log_mean()).value)
    -inf

    Source: delta method; Owen 2013, section 9.1.
    """
    one_number(**{"the log Z of state": state.largest})
    total, squares, n = state.sums + state.lost
    some = total != 0  # NaN is for the caller to see
    value = jnp.where(
        some, _unit(state.largest) + jnp.log(jnp.where(some, total, 1.0) / n), -jnp.inf
    )
    # Relative variance of the mean: (mean w² / (mean w)² - 1)/(n - 1), with a floor against
    # rounding.
    ess = jnp.where(some, total**2 / jnp.where(some, squares, 1.0), 0.0)
    std_error = jnp.sqrt(jnp.maximum(n / ess - 1, 0.0) / (n - 1))
    return Estimate(value, jnp.where(some, std_error, jnp.inf), ess)


def _unit(largest):
    """The logarithm that weights are counted in units of; 0 as long as there is none above 0."""
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def _add(x, y):
    """The sum as a float, and what it lacks of the true one (Knuth's two-sum); of an infinite one,
    nothing.
    """
    total = x + y
    of_y = total - x
    lost = (x - (total - of_y)) + (y - of_y)
    return total, jnp.where(jnp.isfinite(total), lost, 0.0)


class RunningLogMean(NamedTuple):
    """A streaming estimate of log Z, as functions: what `fjax.fdpg` keeps in its state.

    Attributes:
        init: () -> state.
        update: (state, log_weights) -> state.
        estimate: state -> Estimate.
    """

    init: Callable[[], LogMean]
    update: Callable[[LogMean, Float[Array, "N"]], LogMean]
    estimate: Callable[[LogMean], Estimate]


def running_log_mean() -> RunningLogMean:
    """Estimates log Z from all samples so far, while q changes: each P/q is unbiased under its own
    q.

    >>> log_z = running_log_mean()
    >>> round(float(log_z.estimate(log_z.update(log_z.init(), jnp.zeros(4))).value), 6)
    0.0

    Source: Go et al. 2023, algorithm 1.
    """
    return RunningLogMean(init_log_mean, update_log_mean, log_mean_estimate)


def _together(axis_name, where, **arrays) -> tuple[Array, Array, Array, Array | None]:
    """Checked, stopped, q = π filled in, and the samples of all devices in one."""
    log_pi, target, log_q = jax.lax.stop_gradient(one_axis(**arrays))
    where = as_mask(where, log_pi)
    log_pi, target, log_q = (
        gather(x, axis_name) for x in (log_pi, target, log_pi if log_q is None else log_q)
    )
    return log_pi, target, log_q, gather(where, axis_name)


def _terms(log_pi, log_p, log_q, divergence):
    """(p/q) f(t), which is (π/q) f(t)/t, for each sample: whichever of the two has its digits;
    infinite only where it is.
    """
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
