"""Temperature, top-k and top-p: functions from logits to logits.

-inf stands for tokens that cannot be drawn.

What is sampled from is the softmax of the transformed
logits. A transform is therefore all that a rescoring has to know to give the sampler's
log-probabilities again, and any function with this signature is one: a ban on some tokens is
``lambda logits: jnp.where(banned, -jnp.inf, logits)``.

The makers return the *same* function for the same arguments, so that a transform may be a static
argument of ``jax.jit`` and does not compile anew when it is made anew.

Neither top-k nor top-p sorts the vocabulary. The threshold is found by bisection on the float32
numbers in their order, 32 sums over the vocabulary whatever k or p, which on two CPU cores takes 44
ms for 64 rows of 50257 tokens where a sort takes 870 ms (``make bench ARGS="--phases filter"``).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fjax.types import Array, Bool, Float

__all__ = ["Transform", "chain", "greedy", "identity", "temperature", "top_k", "top_p"]

Transform = Callable[[Float[Array, "*b V"]], Float[Array, "*b V"]]
"""Logits to logits over the last axis; -inf is a token that cannot be drawn."""


def identity(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
    """The model as it is.

    >>> identity(jnp.array([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    return logits


def greedy(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
    """Keeps the most probable token alone, the first of several.

    The limit of temperature 0, with log-probability 0.

    Args:
        logits: over the vocabulary, on the last axis.

    Returns:
        0 at the token, -inf elsewhere; NaN at the token where the logits are no distribution.

    >>> greedy(jnp.array([1.0, 3.0, 3.0])).tolist()
    [-inf, 0.0, -inf]
    """
    columns = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
    # not if all -inf, or any NaN
    zero = jnp.where(logits.max(-1, keepdims=True) > -jnp.inf, jnp.zeros_like(logits), jnp.nan)
    return jnp.where(columns == jnp.argmax(logits, -1, keepdims=True), zero, -jnp.inf)


@functools.cache
def temperature(value: float) -> Transform:
    """Flattens (``value`` > 1) or sharpens (< 1) the distribution: ``logits / value``.

    Args:
        value: a positive number; 1 gives `identity`.

    Raises:
        ValueError: if the value is not a positive, finite number. For the limit 0 there is
            `greedy`.

    >>> temperature(0.5)(jnp.array([0.0, 1.0])).tolist()
    [0.0, 2.0]
    """
    if not 0.0 < value < float("inf"):
        raise ValueError(
            f"temperature must be a positive, finite number, got {value}; for always the most "
            f"probable token use `greedy`."
        )
    if value == 1.0:
        return identity

    def transform(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
        return logits / value

    return transform


@functools.cache
def top_k(k: int | None) -> Transform:
    """Keeps the k most probable tokens (Fan et al. 2018).

    Tokens that tie with the k-th are kept too, so that the result does not depend on the order of
    the vocabulary.

    Args:
        k: at least 1; None, or as many as the vocabulary has, keeps all.

    Raises:
        ValueError: if k is below 1.

    >>> top_k(2)(jnp.array([1.0, 4.0, 2.0, 3.0])).tolist()
    [-inf, 4.0, -inf, 3.0]

    Source: Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", 2018, section 5.4.
    """
    if k is None:
        return identity
    if k < 1:
        raise ValueError(f"top_k must keep at least 1 token, got {k}; None keeps all.")

    def transform(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
        if k >= logits.shape[-1]:
            return logits
        return _keep_largest(logits, lambda kept: kept.sum(-1, keepdims=True) >= k)

    return transform


@functools.cache
def top_p(p: float) -> Transform:
    """Keeps the fewest most probable tokens that together reach p (nucleus sampling).

    The token that crosses p is kept, hence at least one always is, and so are all that tie with it.
    The distribution after that is renormalised by whoever takes the softmax. A token within
    rounding of the edge may fall on either side in another program, which moves every
    log-probability by about that token's mass.

    Args:
        p: in (0, 1]; 1 gives `identity`.

    Raises:
        ValueError: if p is outside (0, 1].

    >>> top_p(0.7)(jnp.log(jnp.array([0.5, 0.1, 0.3, 0.1]))).round(2).tolist()
    [-0.69, -inf, -1.2, -inf]

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020, section 3.1.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {p}.")
    if p == 1.0:
        return identity

    def transform(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
        fixed = jax.lax.stop_gradient(logits)
        mass = jnp.exp((fixed - fixed.max(-1, keepdims=True)).astype(jnp.float32))
        enough = p * mass.sum(-1, keepdims=True)
        return _keep_largest(
            logits, lambda kept: jnp.where(kept, mass, 0.0).sum(-1, keepdims=True) >= enough
        )

    return transform


@functools.cache
def chain(*transforms: Transform) -> Transform:
    """Applies the transforms from left to right; the order matters.

    >>> both = chain(temperature(0.5), top_k(1))
    >>> both(jnp.array([1.0, 4.0])).tolist()
    [-inf, 8.0]
    >>> both is chain(temperature(0.5), top_k(1))
    True
    """

    def transform(logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
        return functools.reduce(lambda x, function: function(x), transforms, logits)

    return transform


# The float32 numbers from -inf to inf as consecutive integers, and one past the last.
_LOWEST, _PAST_HIGHEST = -0x7F800001, 0x7F800001


def _keep_largest(
    logits: Float[Array, "*b V"], is_enough: Callable[[Bool[Array, "*b V"]], Bool[Array, "*b 1"]]
) -> Float[Array, "*b V"]:
    """Keeps the fewest of the largest logits that are enough, and ties with the smallest.

    ``is_enough`` must hold for the whole vocabulary, and for every larger set if it does for a
    smaller.
    """
    values = jax.lax.stop_gradient(logits).astype(jnp.float32)
    low = jnp.full_like(values[..., :1], _LOWEST, jnp.int32)
    high = jnp.full_like(low, _PAST_HIGHEST)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # (low + high) // 2 would overflow
        enough = is_enough(values >= _nth_float(middle))
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jnp.where(values < _nth_float(low), -jnp.inf, logits)  # in this direction, NaN stays NaN


def _nth_float(order: Array) -> Array:
    """The float32 at a place in the order of all of them.

    Positive bit patterns ascend, negative ones descend.
    """
    return jax.lax.bitcast_convert_type(
        jnp.where(order < 0, order ^ 0x7FFFFFFF, order), jnp.float32
    )
