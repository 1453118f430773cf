"""Products and means that stay finite where the formula does, in log space."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from fjax.types import Array, Bool, Float

ArrayOrNone = TypeVar("ArrayOrNone", bound=Array | None)

_HALVINGS = 14

# Accelerators multiply float32 in fewer bits unless told otherwise: moments would be met to three
# digits only.
dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def map_contexts(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` over the contexts of arrays ``[C, ...]``.

    A single one goes through the function itself, which is traced in two thirds of the time.

    >>> map_contexts(jnp.sum)(jnp.ones((1, 3))).tolist(), map_contexts(jnp.sum)(jnp.eye(2)).tolist()
    ([3.0], [1.0, 1.0])
    """

    def apply(*given):
        if len(jax.tree.leaves(given)[0]) != 1:
            return jax.vmap(function)(*given)
        found = function(*jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), given))
        return jax.tree.map(lambda x: jax.lax.expand_dims(x, (0,)), found)

    return apply


def times_exp(x: Float[Array, "*n"], s: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``x · exp(s)``, 0 at ``s = -inf`` even where x is infinite. To be differentiated.

    For factors of which it is known that x grows slower than exp(-s) as s → -inf.
    """
    zero = jnp.isneginf(s)
    # Double `where`: the branch that is not taken must not see inf · 0, whose NaN would pass into
    # gradients.
    product = jnp.where(zero, 0.0, x) * jnp.exp(jnp.where(zero, 0.0, s))
    return jnp.where(zero, 0.0, product)


def weighted(x: Float[Array, "*n"], log_weight: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """``x · exp(log_weight)`` through logarithms: infinite only where the product is.

    0 wins over inf.

    Neither factor alone may over- or underflow: x = 1e30 with a weight of e^-100 is e^-31, not 0.
    Not for gradients.
    """
    zero = (x == 0) | jnp.isneginf(log_weight)
    size = jnp.log(jnp.abs(jnp.where(zero, 1.0, x))) + jnp.where(zero, 0.0, log_weight)
    return jnp.where(zero, 0.0, jnp.sign(x) * jnp.exp(size))


def continued(
    function: Callable[[Float[Array, "*m"]], Float[Array, "*m"]], log_t: Float[Array, "*n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """An elementwise function of t as x · exp(s), with x and s finite for finite log_t.

    So it goes on where the function itself overflows.

    What grows beyond the floats has become a power of t long before, to any precision, and is
    continued as that power from halfway there. So its product with a weight is infinite only where
    it is. To be differentiated.
    """
    stopped = jax.lax.stop_gradient(log_t)
    shares = 0.5 ** jnp.arange(_HALVINGS + 1, dtype=log_t.dtype).reshape(-1, *[1] * log_t.ndim)
    on_the_way = shares * stopped[None]  # from log_t itself towards t = 1
    values = function(on_the_way)
    known = jnp.isfinite(values)
    beyond = jnp.isinf(values[0]) & jnp.isfinite(stopped) & known.any(axis=0)
    near = jnp.sign(stopped) * jnp.where(known, jnp.abs(on_the_way), 0.0).max(axis=0)
    point = jnp.where(beyond, jax.lax.stop_gradient(near), log_t)
    inside, slope = jax.jvp(function, (point,), (jnp.ones_like(point),))
    power = jax.lax.stop_gradient(jnp.where(beyond, slope / jnp.where(beyond, inside, 1.0), 0.0))
    # Double `where`: an infinite slope must not meet the 0 that selection sends back.
    return inside, power * jnp.where(beyond, log_t - jax.lax.stop_gradient(point), 0.0)


def in_range(x: Float[Array, "*n"]) -> Bool[Array, "*n"]:
    """Whether an entry has all its digits: neither has it overflowed nor, as 0 has, underflowed."""
    return jnp.isfinite(x) & (jnp.abs(x) >= jnp.finfo(x.dtype).tiny)


def count(x: Float[Array, "N"], where: Bool[Array, "N"] | None) -> Float[Array, ""]:
    """How many entries ``where`` counts, as a float of x's dtype; all if it is None."""
    return jnp.asarray(x.shape[0], x.dtype) if where is None else where.sum(dtype=x.dtype)


def keep(
    x: Float[Array, "N"], where: Bool[Array, "N"] | None, otherwise: float | Float[Array, ""]
) -> Float[Array, "N"]:
    """The entries counted; ``otherwise`` elsewhere, whatever stood there, NaN included."""
    return x if where is None else jnp.where(where, x, otherwise)


def deviations(
    x: Float[Array, "N"], where: Bool[Array, "N"] | None = None
) -> tuple[Float[Array, ""], Float[Array, "N"]]:
    """An entry c, and how far each counted one is from it.

    To be averaged in place of x, as mean = c + mean deviation.

    So equal entries deviate by exactly 0, and so do all that differ by rounding only (four units in
    the last place), which would come out at full size where something is divided by their spread.
    Not counted is 0. c is the smallest in absolute value, lest the others lose their digits beside
    a large one.
    """
    size = keep(jnp.abs(x), where, jnp.inf)
    finite = jnp.isfinite(size)
    smallest = size == jnp.where(finite, size, jnp.inf).min(initial=jnp.inf)
    # By sums and minima only: an entry cannot be picked out of rows that are spread over an
    # explicit mesh.
    reference = jnp.where(finite.any(), jnp.where(smallest, x, jnp.inf).min(initial=jnp.inf), 0.0)
    deviation = keep(x - reference, where, 0.0)
    rounding = 4 * jnp.finfo(x.dtype).eps * keep(jnp.abs(x), where, 0.0).max(initial=0.0)
    # NaN and inf are above it: they stay, for the caller to see.
    return reference, jnp.where(jnp.abs(deviation).max(initial=0.0) < rounding, 0.0, deviation)


def centred(x: Float[Array, "N"], where: Bool[Array, "N"] | None = None) -> Float[Array, "N"]:
    """The entries minus the mean of those counted; 0 where not counted.

    Exactly 0 where all are equal but for rounding.
    """
    _, deviation = deviations(x, where)
    return keep(deviation - deviation.sum() / count(x, where), where, 0.0)


def mean_and_error(
    x: Float[Array, "N"], *, where: Bool[Array, "N"] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and standard error (with n - 1) of the entries counted; NaN for one alone."""
    n = count(x, where)
    mean = keep(x, where, 0.0).sum() / n
    squares = keep((x - mean) ** 2, where, 0.0)
    # An infinite mean has no spread worth a number: inf - inf would be NaN where the honest answer
    # is "unbounded".
    error = jnp.where(jnp.isinf(mean), jnp.inf, jnp.sqrt(squares.sum() / (n - 1) / n))
    return mean, error


def ess_from_logs(log_sum: Float[Array, ""], log_sum_sq: Float[Array, ""]) -> Float[Array, ""]:
    """(Σw)²/Σw² from log Σw and log Σw²; 0 where all weights are 0."""
    some = ~jnp.isneginf(log_sum)
    return jnp.where(
        some, jnp.exp(2 * jnp.where(some, log_sum, 0.0) - jnp.where(some, log_sum_sq, 0.0)), 0.0
    )


def ess_of(log_weights: Float[Array, "N"]) -> Float[Array, ""]:
    """(Σw)²/Σw², the weights shifted by the largest so that scale costs no precision."""
    top = jnp.max(log_weights, initial=-jnp.inf)
    shifted = log_weights - jnp.where(jnp.isneginf(top), 0.0, top)
    return ess_from_logs(jax.nn.logsumexp(shifted), jax.nn.logsumexp(2 * shifted))


@jax.custom_jvp
def wright_omega(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The solution w of w + log w = x, which is Lambert's W0(e^x) without the exponential.

    Source: Corless and Jeffrey 2002; Lawrence et al. 2012 for the iteration.
    """
    x = jnp.asarray(x)
    finite = jnp.where(jnp.isfinite(x), x, 0.0)
    guess = jnp.where(
        finite > 1,
        finite - jnp.log(jnp.maximum(finite, 1.0)),
        jnp.exp(jnp.minimum(finite, 1.0) - 1),
    )
    # Below -30 the solution is e^x to any precision; from 1 and e^(x-1) four steps of third order
    # are enough elsewhere.
    w = jnp.where(finite < -30, jnp.exp(jnp.minimum(finite, 0.0)), guess)
    for _ in range(4):
        safe = jnp.maximum(w, jnp.finfo(w.dtype).tiny)
        residual = jnp.where(finite < -30, 0.0, finite - safe - jnp.log(safe))
        turn = 2 * (1 + safe) * (1 + safe + 2 * residual / 3)
        w = safe * (1 + residual / (1 + safe) * (turn - residual) / (turn - 2 * residual))
    return jnp.where(
        jnp.isneginf(x), 0.0, jnp.where(jnp.isposinf(x), jnp.inf, jnp.where(jnp.isnan(x), x, w))
    )


@wright_omega.defjvp
def _wright_omega_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    w = wright_omega(x)
    # w/(1 + w), written so that it is 1 at infinity.
    return w, dx / (1 + 1 / jnp.maximum(w, jnp.finfo(w.dtype).tiny))


def gather(x: ArrayOrNone, axis_name: str | None) -> ArrayOrNone:
    """The entries of all devices along ``axis_name``, as one axis, the same on each.

    x itself if there is no such axis.

    Statistics are of numbers a sample, so bringing them all together costs nothing beside the model
    that made them, and every formula stays the one of a single device.
    """
    if x is None or axis_name is None:
        return x
    # A sum of zeros and own rows, and not `all_gather`: its result is known to be the same
    # everywhere.
    kept = x.astype(jnp.int32) if x.dtype == bool else x
    rows = (
        jnp.zeros((jax.lax.axis_size(axis_name), *x.shape), kept.dtype)
        .at[jax.lax.axis_index(axis_name)]
        .set(kept)
    )
    return jax.lax.psum(rows, axis_name).reshape(-1, *x.shape[1:]).astype(x.dtype)
