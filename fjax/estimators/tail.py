"""Whether an estimate from weights can be relied on: how heavy the tail of the weights is."""

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask, one_axis
from fjax._numerics import gather, keep
from fjax._sharding import together
from fjax.types import Array, Bool, Float, Int

_FEWEST = 5  # weights that a tail is fitted to
_LIGHT = 0.01  # the largest weight is so little above the next smaller ones: there is no tail


def pareto_k(
    log_weights: Float[Array, "N"],
    *,
    where: Bool[Array, "N"] | Int[Array, "N"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Pareto k̂: the weights have 1/k moments; above 0.7 what they average cannot be relied on.

    The largest min(n/5, 3√n) of the n weights that are not 0, less the next smaller one, are fitted
    by a generalised Pareto distribution, P(w > x) = (1 + k x/σ)^(-1/k). From k = ½ on the variance
    is infinite, from 1 on the mean. The effective sample size does not say so: it is computed from
    the weights that were met, and a heavy tail is one whose largest were not. Weights of 0 do no
    harm and are left out. Several that differ by less than √ε of their precision are one weight, as
    those of a constraint or of a reward of 0 and 1 are, but for the rounding of log q.

    Args:
        log_weights: log w, up to a common constant.
        where: samples that count.
        axis_name: mapped axis of `jax.pmap` or `jax.shard_map` over which the samples are spread;
            all count together.

    Returns:
        k̂, drawn towards ½ by ten more weights' worth of prior. inf where it rests on too little:
        fewer than 21 weights above 0, or fewer than 5 above the others. -inf where the largest are
        within a hundredth of each other.

    >>> uniform = (jnp.arange(4000) + 0.5) / 4000
    >>> round(float(pareto_k(-0.4 * jnp.log(uniform))), 1)             # w = u^-0.4
    0.4
    >>> float(pareto_k(jnp.zeros(12)))
    inf

    Source: Vehtari et al. 2024 (PSIS, arXiv 1507.02646), section 3 and appendix; the fit is that of
    Zhang and Stephens 2009.
    """
    (log_weights,) = one_axis(log_weights=jax.lax.stop_gradient(log_weights))
    log_weights = keep(log_weights, as_mask(where, log_weights), -jnp.inf)
    return _pareto_k(gather(log_weights, axis_name))


@jax.jit  # many small operations, each of which would be compiled by itself
def _pareto_k(log_weights):
    excesses, size = _excesses(log_weights)
    n = jnp.sum(excesses > 0)
    shape = (n * _fit(excesses) + 5) / (n + 10)
    k = jnp.where(n >= _FEWEST, shape, jnp.inf)
    k = jnp.where(jnp.max(excesses, initial=0.0) < _LIGHT, -jnp.inf, k)
    k = jnp.where(size >= _FEWEST, k, jnp.inf)
    return jnp.where(jnp.isnan(log_weights).any(), jnp.nan, k)


def _excesses(log_weights):
    """How far the largest weights lie above the next one, in units of the largest; their number.

    Largest first; 0 beyond that number, which depends on how many weights are above 0.
    """
    log_weights = together(log_weights)
    ordered = jnp.append(-jnp.sort(-log_weights), -jnp.inf)
    size = _tail_size(jnp.sum(~jnp.isneginf(log_weights)), jnp)
    most = int(_tail_size(log_weights.shape[0], np))
    weights = jnp.exp(ordered - jnp.where(jnp.isneginf(ordered[0]), 0.0, ordered[0]))
    largest = jnp.arange(most) < size
    # Several of one weight, rounded apart, would be fitted as a tail, and as a heavy one.
    same = largest & (ordered[:most] - ordered[size] < jnp.finfo(ordered.dtype).eps ** 0.5)
    counts = largest & ~(same & (same.sum() >= _FEWEST))
    return jnp.where(counts, weights[:most] - weights[size], 0.0), size


def _tail_size(n, numpy):
    return numpy.ceil(numpy.minimum(0.2 * n, 3 * n**0.5)).astype(int)


def _fit(x):
    """The shape k of a generalised Pareto distribution; entries from large to small, 0 for none.

    The mean over θ = -k/σ under the profile likelihood and the prior of Zhang and Stephens.
    """
    exists = x > 0
    n = exists.sum().astype(x.dtype)
    quartile = x[(n - jnp.floor(n / 4 + 0.5)).astype(int)]
    points = 30 + jnp.floor(jnp.sqrt(n))
    j = jnp.arange(1, 31 + int(len(x) ** 0.5), dtype=x.dtype)
    theta = 1 / x[0] + (1 - jnp.sqrt(points / (j - 0.5))) / (3 * quartile)
    theta = jnp.where(theta == 0, jnp.finfo(x.dtype).eps / x[0], theta)  # the formula's is 0/0

    def shape(theta):
        return jnp.sum(jnp.log1p(-theta * x), where=exists) / n

    shapes = jax.vmap(shape)(theta)
    log_likelihood = n * (jnp.log(-theta / shapes) - shapes - 1)
    weights = jax.nn.softmax(jnp.where(j <= points, log_likelihood, -jnp.inf))
    return shape(jnp.sum(weights * theta))
