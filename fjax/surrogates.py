"""Losses whose gradient is that of the divergence: the score-function surrogates of f-DPG.

    ∇D_f(π‖p) = E_{x~q}[ (π/q) (f'(π/p) - B) ∇log π ]        for every q that covers π, and every B
    independent of x

Everything but the last factor is a constant to the gradient, so the loss is linear in ``log_pi``
with stopped weights. The shared argument order is (log_pi, log_p, log_q): policy, target, where the
samples came from.

Source: Go et al. 2023 (f-DPG, arXiv 2302.08215), theorem 1 and section 3.3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fjax._checks import as_mask, is_concrete, made, one_axis, one_number, same_shape
from fjax._numerics import continued, deviations, gather, in_range, keep, weighted
from fjax.divergences import FDivergence
from fjax.types import Array, Bool, Float, Int

__all__ = [
    "Baseline",
    "RunningMean",
    "centred_weights",
    "importance_weights",
    "leave_one_out",
    "pseudo_rewards",
    "running_mean",
    "score_weights",
    "self_normalized",
    "self_normalized_log_q",
    "surrogate_loss",
]


Baseline = Callable[[Float[Array, "N"]], Float[Array, "N"]]
"""Score weights in, B for each sample out. To be unbiased, B_i must not depend on sample i."""


def importance_weights(log_pi: Float[Array, "*n"], log_q: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """π(x)/q(x), stopped.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_q: under the distribution that the samples came from.

    >>> importance_weights(jnp.array([-1.0]), jnp.array([-1.0])).tolist()
    [1.0]

    Source: Owen 2013, section 9.1.
    """
    log_pi, log_q = same_shape(log_pi=log_pi, log_q=log_q)
    return jnp.exp(jax.lax.stop_gradient(log_pi - log_q))


def pseudo_rewards(
    log_pi: Float[Array, "*n"],
    log_p: Float[Array, "*n"],
    *,
    divergence: FDivergence,
    clip: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
) -> Float[Array, "*n"]:
    """-f'(π/p), stopped: the reward with which policy gradient descends D_f(π‖p).

    It depends on the policy, hence "pseudo". What is in it off the support of p is -f'(∞): 0 for
    forward KL, which never punishes, -½ for total variation, -∞ for reverse KL.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_p: under the normalised target; -inf outside its support.
        divergence: which f.
        clip: (lowest, highest) value of f', see `score_weights`.

    >>> from fjax import total_variation
    >>> log_pi, log_p = jnp.array([-1.0, -1.0]), jnp.array([0.0, -jnp.inf])
    >>> pseudo_rewards(log_pi, log_p, divergence=total_variation()).tolist()
    [0.5, -0.5]

    Source: Go et al. 2023, section 3.2.
    """
    log_pi, log_p, _ = _checked(log_pi, log_p, None, divergence, clip)
    return -_derivative(_log_t(log_pi, log_p), divergence, clip)


def score_weights(
    log_pi: Float[Array, "*n"],
    log_p: Float[Array, "*n"],
    log_q: Float[Array, "*n"] | None = None,
    *,
    divergence: FDivergence,
    clip: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
) -> Float[Array, "*n"]:
    """The factor of ∇log π in the gradient: (π/q) f'(π/p), stopped.

    Formed through logarithms, and where f' itself over- or underflows as (p/q)·t f'(t), t f' being
    the slope of f in log t, so that ∞·0 never arises: forward KL gives -p/q however small π is, and
    0 where p = 0 however large π/q. Where both overflow, f' is continued as the power of t that it
    has become.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_p: under the normalised target; -inf outside its support.
        log_q: under the sampling distribution; None means on-policy, q = π.
        divergence: which f.
        clip: (lowest, highest) value of f' let through. The pseudo-reward is -f', so the lowest
            bounds what a sample may earn and the highest what it may lose. Clipping biases the
            gradient: it is that of another objective.

    Returns:
        One weight a sample; infinite only where the formula is (reverse KL where p = 0), or where
        its value is no float.

    Raises:
        ValueError: if the shapes differ, or clip is not an increasing pair.

    >>> from fjax import forward_kl
    >>> log_pi, log_p, log_q = jnp.array([[-200.0], [-2.0], [-2.0]])
    >>> score_weights(log_pi, log_p, log_q, divergence=forward_kl()).tolist()
    [-1.0]

    Source: Go et al. 2023, theorem 1.
    """
    log_pi, log_p, log_q = _checked(log_pi, log_p, log_q, divergence, clip)
    log_t = _log_t(log_pi, log_p)
    slope, exponent = continued(divergence.derivative, log_t)
    derivative = _together(slope, exponent)
    clipped = derivative if clip is None else jnp.clip(derivative, *clip)
    if log_q is None:
        return clipped
    # t f'(t), at -inf its limit: reached long before the lowest float.
    lowest, highest = jnp.finfo(log_t.dtype).min, jnp.finfo(log_t.dtype).max
    _, t_slope = jax.jvp(
        divergence.generator, (jnp.clip(log_t, lowest, highest),), (jnp.ones_like(log_t),)
    )
    lost = ~in_range(slope) | (exponent != 0)
    by_p = lost & (in_range(t_slope) | (jnp.isneginf(log_t) & jnp.isneginf(slope)))
    weights = jnp.where(
        by_p, weighted(t_slope, log_p - log_q), weighted(slope, exponent + log_pi - log_q)
    )
    if clip is None:
        return weights
    return jnp.where(clipped == derivative, weights, weighted(clipped, log_pi - log_q))


def leave_one_out(
    scores: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    strata: Int[Array, "N"] | Bool[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "N"]:
    """For each sample the mean of the others' scores: a baseline that leaves the gradient unbiased.

    B_i = (Σ_j s_j - s_i)/(n - 1). It does not depend on sample i, so E[B_i ∇log π(x_i)] = 0. The
    plain batch mean does, and shrinks the gradient by (n - 1)/n.

    Samples drawn in fixed numbers n_s from the components of a mixture q, say from the policy and
    from the base model, are not alike: leaving out sample i leaves one fewer of its own kind, so
    the mean of B_i depends on where it came from, which biases the gradient. With ``strata``

        B_i = Σ_s (n_s/N) · mean of the scores of stratum s without s_i

    whose mean is the same for every i. A stratum of a single member adds 0 to all of them, its own
    and the others'.

    Args:
        scores: one value a sample, here ``score_weights``. An infinite one leaves no finite
            baseline: clip it before.
        where: samples that count; as a baseline of some of them, ``functools.partial(leave_one_out,
            where=where)``.
        strata: which component each sample was drawn from, by any numbers from 0 to N - 1 (or as
            booleans, if there are two); B of a sample with another number is NaN. None: all are
            from one distribution.
        axis_name: mapped axis over which the samples are spread; the others on all devices count.

    Returns:
        One value a sample; 0 for all if none has others. Where all scores are equal up to rounding,
        B_i is s_i exactly.

    Raises:
        ValueError: if the array holds a single sample, which has no others; or on differing shapes.

    >>> leave_one_out(jnp.array([1.0, 2.0, 6.0])).tolist()
    [4.0, 3.5, 1.5]
    >>> leave_one_out(jnp.array([1.0, 2.0, 6.0, 8.0]), strata=jnp.array([0, 0, 1, 1])).tolist()
    [4.5, 4.0, 4.75, 3.75]

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO, arXiv 2402.14740); strata: Owen 2013,
    sections 8.4 and 9.11.
    """
    (own,) = one_axis(scores=jax.lax.stop_gradient(scores))
    where, strata = as_mask(where, own), _as_strata(strata, own)
    if own.shape[0] < 2 and axis_name is None:
        raise ValueError(
            f"A leave-one-out baseline needs at least 2 samples, got {own.shape[0]}: draw more, or "
            f"use baseline=0.0."
        )
    everyone, counted, all_strata = (
        gather(own, axis_name),
        gather(where, axis_name),
        gather(strata, axis_name),
    )
    # Averaged are deviations, so that equal scores leave exactly nothing.
    reference, deviation = deviations(everyone, counted)
    equal = ~(deviation != 0).any()
    sizes, own_size = _by_stratum(keep(jnp.ones_like(everyone), counted, 0.0), all_strata, strata)
    sums, own_sum = _by_stratum(deviation, all_strata, strata)
    n, several = jnp.maximum(sizes.sum(), 1), sizes > 1
    share = jnp.where(several, sizes, 0.0).sum() / n
    # n_s times the mean of the others, less the sum that has the sample in it.
    change = (own_sum - own_size * (own - reference)) / jnp.maximum(own_size - 1, 1)
    change = keep(jnp.where(own_size == 1, 0.0, change), where, 0.0)
    baseline = reference * share + (jnp.where(several, sums, 0.0).sum() + change) / n
    return jnp.where(equal & (own_size > 0), keep(own, where, reference) * share, baseline)


def self_normalized(
    log_pi: Float[Array, "N"], log_q: Float[Array, "N"], *, axis_name: str | None = None
) -> Baseline:
    """The self-normalised control variate, B = Σ w_i/Σ ρ_i.

    It estimates E_π[f'], with ρ = π/q and w = ρ f'. The centred weights w_i - ρ_i B sum to exactly
    0. Biased by a term of order 1/n, for B contains the sample it is subtracted from; where the ρ_i
    vary much its error is far below that of `leave_one_out`, which divides by n - 1 instead of by
    what the weights really sum to.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_q: under the sampling distribution.
        axis_name: mapped axis over which the samples are spread; all count together.

    >>> log_pi, log_q = jnp.log(jnp.array([0.4, 0.1])), jnp.log(jnp.array([0.2, 0.2]))
    >>> baseline = self_normalized(log_pi, log_q)
    >>> centred_weights(jnp.array([4.0, 1.0]), log_pi, log_q, baseline=baseline).tolist()
    [0.0, 0.0]

    Source: Owen 2013, section 9.2 and 8.9; Pandey et al. 2024 (BRAIn, arXiv 2402.02479) for forward
    KL.
    """
    log_pi, log_q = one_axis(log_pi=log_pi, log_q=log_q)
    total = gather(importance_weights(log_pi, log_q), axis_name).sum()
    total = jnp.where(total == 0, 1.0, total)  # samples that none could draw count for nothing

    def baseline(weights: Float[Array, "N"]) -> Float[Array, "N"]:
        weights, _ = one_axis(weights=weights, log_pi=log_pi)
        return jnp.broadcast_to(gather(weights, axis_name).sum() / total, weights.shape)

    return baseline


def self_normalized_log_q(
    log_pi: Float[Array, "N"], log_q: Float[Array, "N"], *, axis_name: str | None = None
) -> Float[Array, "N"]:
    """Log q shifted so that the importance weights π/q average to exactly 1.

    To be given as ``log_q`` to `surrogate_loss` and `score_weights`. Biased by a term of order 1/n,
    consistent, and of a smaller variance when q is far from π or known up to a constant only.

    Args:
        log_pi: log-probabilities under the policy, in nats.
        log_q: under the sampling distribution, up to a constant.
        axis_name: mapped axis over which the samples are spread; all average to 1 together.

    >>> log_q = self_normalized_log_q(jnp.zeros(2), jnp.array([5.0, 5.0]))
    >>> importance_weights(jnp.zeros(2), log_q).tolist()
    [1.0, 1.0]

    Source: Owen 2013, section 9.2.
    """
    log_pi, log_q = jax.lax.stop_gradient(one_axis(log_pi=log_pi, log_q=log_q))
    log_ratio = gather(log_pi - log_q, axis_name)
    return log_q + jax.nn.logsumexp(log_ratio) - jnp.log(log_ratio.shape[0])


class RunningMean(NamedTuple):
    """A baseline from *earlier* batches, as functions.

    Attributes:
        init: () -> state.
        update: (state, score weights of a batch, *, axis_name=None) -> state; call it after the
            loss.
        value: state -> B, 0 before anything was seen.
    """

    init: Callable[[], Float[Array, "2"]]
    update: Callable[..., Float[Array, "2"]]
    value: Callable[[Float[Array, "2"]], Float[Array, ""]]


def running_mean(decay: float | Float[Array, ""] = 0.99) -> RunningMean:
    """B = exponentially forgetting mean of the score weights of earlier batches.

    Unbiased: it does not depend on the samples it is subtracted from, if the state is updated after
    its use. Lags behind when f' moves quickly; `leave_one_out` does not.

    Args:
        decay: what is left of the past at each update, between 0 and 1.

    Raises:
        ValueError: if the decay is out of range.

    >>> baseline = running_mean(0.5)
    >>> state = baseline.update(baseline.init(), jnp.array([1.0, 3.0]))
    >>> float(baseline.value(state))
    2.0

    Source: Go et al. 2023, section 3.3; Williams 1992.
    """
    one_number(decay=decay)
    if is_concrete(decay) and not 0 <= decay < 1:
        raise ValueError(f"decay is at least 0 and below 1, got {decay}.")

    def update(
        state: Float[Array, "2"], weights: Float[Array, "N"], *, axis_name: str | None = None
    ) -> Float[Array, "2"]:
        (weights,) = one_axis(weights=jax.lax.stop_gradient(weights))
        batch = jnp.stack([gather(weights, axis_name).mean(), jnp.ones((), weights.dtype)])
        return (decay * state + (1 - decay) * batch).astype(state.dtype)

    def value(state):
        return jnp.where(state[1] > 0, state[0] / jnp.where(state[1] > 0, state[1], 1.0), 0.0)

    return RunningMean(lambda: jnp.zeros(2), update, value)


def centred_weights(
    weights: Float[Array, "N"],
    log_pi: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    baseline: float | Float[Array, "*n"] | Baseline,
) -> Float[Array, "N"]:
    """Score weights minus (π/q)·B, stopped: what multiplies ∇log π in the end.

    Without the factor π/q the baseline would add B·E_q[∇log π], which is 0 only on-policy:
    off-policy a bias.

    Args:
        weights: from `score_weights`.
        log_pi: log-probabilities under the policy, in nats.
        log_q: under the sampling distribution; None means on-policy.
        baseline: see `surrogate_loss`.

    >>> centred_weights(jnp.array([1.0, 3.0]), jnp.zeros(2), baseline=leave_one_out).tolist()
    [-2.0, 2.0]

    Source: Go et al. 2023, section 3.3, in the off-policy form.
    """
    weights, log_pi, log_q = jax.lax.stop_gradient(
        one_axis(weights=weights, log_pi=log_pi, log_q=log_q)
    )
    value = baseline(weights) if callable(baseline) else jnp.asarray(baseline, weights.dtype)
    if value.shape not in ((), weights.shape):
        raise ValueError(
            f"A baseline has shape () or {weights.shape}, one value or one a sample; got "
            f"{value.shape}."
        )
    value = jnp.broadcast_to(jax.lax.stop_gradient(value).astype(weights.dtype), weights.shape)
    if log_q is not None:
        value = weighted(value, log_pi - log_q)
    # An infinite weight stays one, for the caller to see and skip: inf - inf would be NaN.
    return jax.lax.stop_gradient(jnp.where(jnp.isinf(weights), weights, weights - value))


def surrogate_loss(
    log_pi: Float[Array, "N"],
    log_p: Float[Array, "N"],
    log_q: Float[Array, "N"] | None = None,
    *,
    divergence: FDivergence,
    baseline: float | Float[Array, "*n"] | Baseline = 0.0,
    clip: tuple[float | Float[Array, ""], float | Float[Array, ""]] | None = None,
) -> Float[Array, "N"]:
    """Per-sample loss to minimise: ``stop[(π/q)(f'(π/p) - B)] · log π``.

    The gradient of its mean estimates ∇D_f(π‖p), without bias if log_p is that of the true target
    and B does not depend on the sample that it is subtracted from. Its value means nothing; watch
    `fjax.estimate_divergence`.

    Args:
        log_pi: log-probabilities under the policy, in nats: the one argument that the gradient
            passes through.
        log_p: under the normalised target, log P - log Z; -inf outside its support.
        log_q: under the sampling distribution; None means on-policy.
        divergence: which f.
        baseline: B: a number, one value a sample, or a function of the score weights. Unbiased: any
            number that does not depend on the samples (a constant, a `running_mean` of earlier
            batches), and `leave_one_out`. Biased by order
            1/n: the plain mean, which shrinks the gradient by (n-1)/n, and `self_normalized`.
            Off-policy it is multiplied by π/q, without which it would bias the gradient.
        clip: bounds of f', see `score_weights`. Biases.

    Returns:
        One loss a sample, unreduced.

    Raises:
        ValueError: on differing shapes, a clip that is not an increasing pair, or leave-one-out of
            a single sample.

    >>> from fjax import jensen_shannon
    >>> log_pi, log_p = jnp.array([-1.0, -1.0]), jnp.array([-1.0, -jnp.inf])
    >>> def loss(log_pi):
    ...     return surrogate_loss(log_pi, log_p, divergence=jensen_shannon()).sum()
    >>> gradient = jax.grad(loss)(log_pi)
    >>> gradient.round(3).tolist()
    [0.0, 0.347]

    Source: Go et al. 2023, theorem 1 and section 3.3.
    """
    log_pi, log_p, log_q = one_axis(log_pi=log_pi, log_p=log_p, log_q=log_q)
    weights = score_weights(log_pi, log_p, log_q, divergence=divergence, clip=clip)
    weights = centred_weights(weights, log_pi, log_q, baseline=baseline)
    # A sample of weight 0 is worth 0, and not 0 · -inf, even where the policy gives it no
    # probability.
    return weights * jnp.where(weights == 0, 0.0, log_pi)


def _derivative(log_t, divergence, clip):
    slope = _together(*continued(divergence.derivative, log_t))
    return slope if clip is None else jnp.clip(slope, *clip)


def _together(slope, exponent):
    # A sum may overflow before it is divided by something.
    return jnp.where(exponent == 0, slope, weighted(slope, exponent))


def _log_t(log_pi, log_p):
    # Where neither has mass, log_t would be NaN; the sample's weight π/q is 0 whatever stands here.
    nothing = jnp.isneginf(log_pi) & jnp.isneginf(log_p)
    return jnp.where(nothing, 0.0, log_pi - jnp.where(nothing, 0.0, log_p))


def _checked(log_pi, log_p, log_q, divergence, clip):
    made(divergence)
    if clip is not None:
        one_number(**{"clip[0]": clip[0], "clip[1]": clip[1]})
        if all(map(is_concrete, clip)) and not clip[0] < clip[1]:
            raise ValueError(f"clip is a pair (lowest, highest) of values of f', got {clip}.")
    return jax.lax.stop_gradient(same_shape(log_pi=log_pi, log_p=log_p, log_q=log_q))


def _as_strata(strata, like):
    if strata is None:
        return None
    strata = jnp.asarray(strata)
    if strata.shape != like.shape or jnp.issubdtype(strata.dtype, jnp.inexact):
        raise ValueError(
            f"strata must be one integer a sample, of shape {list(like.shape)}; got "
            f"{strata.dtype.name} of shape {list(strata.shape)}. For several contexts, map the "
            f"function over them with jax.vmap."
        )
    return strata.astype(jnp.int32)


def _by_stratum(x, strata, own_strata):
    """The sum of each stratum, and for each own sample that of its own.

    NaN for one that there is not.
    """
    if strata is None:
        return x.sum()[None], x.sum()
    known, own_known = (
        jnp.where((s >= 0) & (s < x.shape[0]), s, x.shape[0]) for s in (strata, own_strata)
    )
    sums = jax.ops.segment_sum(x, known, num_segments=x.shape[0])
    return sums, sums.at[own_known].get(mode="fill", fill_value=jnp.nan)
