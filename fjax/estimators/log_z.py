"""The normaliser of the target, from one batch or from all that a run has seen."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax._checks import as_mask, float_dtype, is_concrete, one_axis, one_number
from fjax._numerics import count, gather, keep
from fjax.types import Array, Bool, Float, Int

from .means import Estimate


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


class LogMean(NamedTuple):
    """A mean of exp(log_weights) over everything seen so far.

    Sums are in units of the largest weight, which is kept as its log.

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
    """The log-mean log (Σw/n), with its standard error and effective sample size.

    The error is that of the mean, relative to it.

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
    """The sum as a float, and what it lacks of the true one (Knuth's two-sum).

    Of an infinite one, nothing.
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
    """Estimates log Z from all samples so far, while q changes.

    Each P/q is unbiased under its own q.

    >>> log_z = running_log_mean()
    >>> round(float(log_z.estimate(log_z.update(log_z.init(), jnp.zeros(4))).value), 6)
    0.0

    Source: Go et al. 2023, algorithm 1.
    """
    return RunningLogMean(init_log_mean, update_log_mean, log_mean_estimate)


def known_log_z(value: float | Float[Array, ""] = 0.0) -> RunningLogMean:
    """A log Z that is known, and stays so whatever is drawn.

    For scores that are normalised already, as those of `fjax.replay.minibatch` are, or a target
    whose Z is exact. Of several contexts all have this one.

    Args:
        value: log Z, in nats.

    Raises:
        ValueError: if it is not one finite number.

    >>> log_z = known_log_z(-4.4)
    >>> round(float(log_z.estimate(log_z.update(log_z.init(), jnp.zeros(4))).value), 6)
    -4.4

    Source: definition.
    """
    one_number(value=value)
    if is_concrete(value) and not math.isfinite(value):
        raise ValueError(f"The log Z that is known must be a finite number, got {value}.")

    def estimate(state: LogMean) -> Estimate:
        dtype = state.largest.dtype
        return Estimate(*(jnp.asarray(x, dtype) for x in (value, 0.0, jnp.inf)))

    return RunningLogMean(init_log_mean, lambda state, log_weights: state, estimate)
