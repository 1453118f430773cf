"""What one update is made of: samples, and two numbers about each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import as_mask, float_dtype, is_concrete
from fjax.types import Array, Bool, Float, Int


class Rollout(NamedTuple):
    """N samples of one target, or of each of C contexts, as arrays.

    Attributes:
        tokens: prompt and completion, contiguous, padded on the right (`fjax.log_probs.pack`).
        where: tokens that count: the completion up to and including its end-of-sequence token.
        log_q: log-probability of each completion under the distribution it was really drawn from,
            in nats.
        log_score: log P(x) under the unnormalised target; -inf where it is ruled out.
        contexts: which contexts the C rows of samples are of, numbered from 0; needed for one Z a
            context. Rows of the same context share its Z.
        strata: which part of the sampling distribution each sample was drawn from, where their
            numbers were fixed: 0 for the policy (or its proposal), 1 for the base model. None: all
            of one distribution, log q, or of a mixture by chance.
    """

    tokens: Int[Array, "*c N T"]
    where: Bool[Array, "*c N T"]
    log_q: Float[Array, "*c N"]
    log_score: Float[Array, "*c N"]
    contexts: Int[Array, "C"] | None = None
    strata: Int[Array, "*c N"] | None = None


def checked_rollout(rollout: Rollout, num_contexts: int | None) -> Rollout:
    """The same with one leading axis of contexts, of length 1 where there are none, and numbers of
    at least float32.

    This is the door of all online tuners.

    Raises:
        ValueError: for shapes or dtypes that do not belong together, and for contexts that are
            missing or do not exist.
    """
    tokens = checked_tokens(rollout.tokens, name="tokens")
    numbers = {"log_q": rollout.log_q, "log_score": rollout.log_score, "strata": rollout.strata}
    numbers = {name: together(jnp.asarray(x)) for name, x in numbers.items() if x is not None}
    if (
        tokens.ndim < 2
        or tokens.size == 0
        or any(x.shape != tokens.shape[:-1] for x in numbers.values())
    ):
        given = ", ".join(
            f"{name} {list(x.shape)}" for name, x in [("tokens", tokens), *numbers.items()]
        )
        raise ValueError(
            "A Rollout has tokens and where of shape [N, T], and log_q, log_score and strata of "
            "shape [N], N being at least 1; "
            f"for C contexts each of them has a leading axis C. Got {given}."
        )
    where, dtype = (
        as_mask(rollout.where, tokens),
        float_dtype(numbers["log_q"], numbers["log_score"]),
    )
    contexts = _checked_contexts(rollout, num_contexts)
    rows = (-1, tokens.shape[-2])
    return Rollout(
        tokens.reshape(*rows, tokens.shape[-1]),
        where.reshape(*rows, tokens.shape[-1]),
        numbers["log_q"].astype(dtype).reshape(rows),
        numbers["log_score"].astype(dtype).reshape(rows),
        contexts,
        checked_tokens(numbers["strata"], name="strata").reshape(rows)
        if "strata" in numbers
        else None,
    )


def together(x: Array) -> Array:
    """On all devices alike, where explicit sharding has spread it; what any other sharding does
    with it is XLA's business.

    Statistics are of numbers a sample, so bringing them together costs nothing beside the model
    that made them.
    """
    spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.P(*[None] * x.ndim)) if spread else x


def checked_tokens(tokens: Array, *, name: str) -> Int[Array, "*n"]:
    """Integers as an array of JAX, whatever they were.

    Raises:
        ValueError: if they are not integers.
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {tokens.dtype.name}.")
    return tokens


def _checked_contexts(rollout: Rollout, num_contexts: int | None) -> Int[Array, "C"] | None:
    if rollout.contexts is None and num_contexts is None:
        return None
    shape = jnp.shape(rollout.log_q)
    if rollout.contexts is None or jnp.shape(rollout.contexts) != shape[:-1] or len(shape) != 2:
        given = (
            "no contexts"
            if rollout.contexts is None
            else f"contexts of shape {list(jnp.shape(rollout.contexts))}"
        )
        tuner = (
            "A rollout with contexts"
            if num_contexts is None
            else f"A tuner with num_contexts={num_contexts}"
        )
        raise ValueError(
            f"{tuner} needs rollouts with one entry of contexts for each row of samples, log_q "
            f"being [C, N] and contexts [C]; got log_q of shape {list(shape)} and {given}."
        )
    contexts = together(checked_tokens(rollout.contexts, name="contexts"))
    if num_contexts is not None and is_concrete(rollout.contexts):
        # In NumPy: while a program is traced, JAX would trace the comparison of constants, too.
        ids = np.unique(np.asarray(rollout.contexts))
        if ids[0] < 0 or ids[-1] >= num_contexts:
            raise ValueError(
                f"contexts must be from 0 to {num_contexts - 1}, for num_contexts={num_contexts}; "
                f"got {ids.tolist()}."
            )
    return contexts
