"""One token from logits, with its log-probability.

By inverting the cumulative distribution in blocks.

A Gumbel for each entry of the vocabulary is the usual way, and on a CPU most of the time goes into
its random bits and logarithms. Two uniforms a row suffice: one chooses a block of the vocabulary by
its mass, the other a token within the block. Only sums over blocks are taken, never a running sum
over the vocabulary, so float32 loses nothing at V = 50257: the probability of a token is right to
about 1e-7 of its block's. Medians on two CPU cores, log-probability included:

    =================  ===============  ===============
    rows × vocabulary     256 × 2560       64 × 50257
    =================  ===============  ===============
    Gumbel an entry         13.9 ms          98.0 ms
    one running sum          5.2 ms          44.0 ms
    blocks (this)            1.1 ms           5.2 ms
    log-sum-exp alone        0.5 ms           4.9 ms
    =================  ===============  ===============

``make bench ARGS="--phases draw"`` measures them again.
"""

import jax
import jax.numpy as jnp

from fjax._checks import float_dtype
from fjax.types import Array, Float, Int, PRNGKeyArray

__all__ = ["draw"]

BLOCK = 128  # tokens; 64 to 256 take the same time, and 128 is one TPU lane row


def draw(
    rng_key: PRNGKeyArray, logits: Float[Array, "V"]
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Draws one token from ``softmax(logits)``; returns it with its log-probability.

    `jax.vmap` gives rows. A token of probability zero (logit -inf) is never drawn. Equal keys give
    equal tokens whatever the batch around the row.

    Args:
        rng_key: the key of this row and this step.
        logits: unnormalised; half precision is computed in float32. Where they are no distribution
            (all -inf, or NaN or +inf among them) the log-probability is NaN, and the token some id
            of the vocabulary.

    Returns:
        The token (int32) and ``logits[token] - logsumexp(logits)``, in float32 or the wider dtype
        of the logits.

    Raises:
        ValueError: if ``logits`` are not one row.

    >>> token, log_prob = jax.jit(draw)(jax.random.key(0), jnp.array([-jnp.inf, 2.0, -jnp.inf]))
    >>> int(token), float(log_prob)
    (1, 0.0)
    """
    if jnp.ndim(logits) != 1:
        raise ValueError(
            f"logits must be [V], got {list(jnp.shape(logits))}; for rows, map draw over them with "
            f"jax.vmap."
        )
    logits = jnp.asarray(logits, float_dtype(logits))
    between_blocks, within_block = jax.random.uniform(rng_key, (2,), logits.dtype)
    vocabulary = logits.shape[0]
    blocks = jnp.pad(logits, (0, -vocabulary % BLOCK), constant_values=-jnp.inf).reshape(-1, BLOCK)
    largest = logits.max()
    masses = jnp.exp(blocks - largest).sum(-1)
    block = _invert(masses, between_blocks)
    column = _invert(jnp.exp(blocks[block] - largest), within_block)
    # padding has no mass, but without any mass is chosen
    token = jnp.minimum(block * BLOCK + column, vocabulary - 1)
    return token, blocks[block, column] - largest - jnp.log(masses.sum())


def _invert(weights: Float[Array, "n"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """The first index whose cumulative weight exceeds ``uniform`` times the total.

    Never one of weight zero.

    A parallel running sum need not be monotone to the last bit, so positive weights are asked for
    rather than implied, and where rounding leaves no candidate at the upper end, the last positive
    one is taken.
    """
    cumulative, positive = jnp.cumsum(weights), weights > 0
    candidates = positive & (cumulative > uniform * cumulative[-1])
    last = weights.shape[0] - 1 - jnp.argmax(positive[::-1])
    return jnp.where(candidates.any(), jnp.argmax(candidates), last).astype(jnp.int32)
