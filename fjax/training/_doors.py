"""The door of the tuners: what a user hands in is checked here, or brought into one form."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax

from fjax._checks import as_mask, float_dtype, is_concrete
from fjax._sharding import together
from fjax.divergences import FDivergence
from fjax.estimators import RunningLogMean
from fjax.training.base import Rollout
from fjax.types import Array, Bool, Int, Params


def checked_rollout(rollout: Rollout, num_contexts: int | None) -> Rollout:
    """The same with one leading axis of contexts, of length 1 where there are none.

    Its numbers are of at least float32. This is the door of all online tuners.

    Raises:
        ValueError: for shapes or dtypes that do not belong together, and for contexts that are
            missing or do not exist.
    """
    tokens = checked_tokens(rollout.tokens, name="tokens")
    numbers = {"log_q": rollout.log_q, "log_score": rollout.log_score, "strata": rollout.strata}
    numbers = {name: together(jnp.asarray(x)) for name, x in numbers.items() if x is not None}
    _check_shapes(tokens, numbers)
    where = as_mask(rollout.where, tokens)
    dtype = float_dtype(numbers["log_q"], numbers["log_score"])
    contexts = _checked_contexts(rollout, num_contexts)
    rows = (-1, tokens.shape[-2])
    strata = numbers.get("strata")
    return Rollout(
        tokens.reshape(*rows, tokens.shape[-1]),
        where.reshape(*rows, tokens.shape[-1]),
        numbers["log_q"].astype(dtype).reshape(rows),
        numbers["log_score"].astype(dtype).reshape(rows),
        contexts,
        None if strata is None else checked_tokens(strata, name="strata").reshape(rows),
    )


def _check_shapes(tokens: Array, numbers: dict[str, Array]) -> None:
    alike = all(x.shape == tokens.shape[:-1] for x in numbers.values())
    if tokens.ndim >= 2 and tokens.size and alike:
        return
    given = ", ".join(
        f"{name} {list(x.shape)}" for name, x in {"tokens": tokens, **numbers}.items()
    )
    raise ValueError(
        f"A Rollout has tokens and where of shape [N, T], and log_q, log_score and strata of shape "
        f"[N], N being at least 1; for C contexts each of them has a leading axis C. Got {given}."
    )


def _checked_contexts(rollout: Rollout, num_contexts: int | None) -> Int[Array, "C"] | None:
    if rollout.contexts is None and num_contexts is None:
        return None
    shape = jnp.shape(rollout.log_q)
    if rollout.contexts is None or jnp.shape(rollout.contexts) != shape[:-1] or len(shape) != 2:
        raise ValueError(_contexts_of_shape(rollout, num_contexts))
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


def _contexts_of_shape(rollout: Rollout, num_contexts: int | None) -> str:
    """What there should be, and what there is."""
    known = num_contexts is not None
    whose = f"A tuner with num_contexts={num_contexts}" if known else "A rollout with contexts"
    given = "no contexts"
    if rollout.contexts is not None:
        given = f"contexts of shape {list(jnp.shape(rollout.contexts))}"
    return (
        f"{whose} needs rollouts with one entry of contexts for each row of samples, log_q being "
        f"[C, N] and contexts [C]; got log_q of shape {list(jnp.shape(rollout.log_q))} and {given}."
    )


def checked_tokens(tokens: Array, *, name: str) -> Int[Array, "*n"]:
    """Integers as an array of JAX, whatever they were.

    Raises:
        ValueError: if they are not integers.
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got {tokens.dtype.name}.")
    return tokens


def as_log_probs(log_prob_fn: Callable, *, of_tokens: bool = False) -> Callable:
    """The user's function, held to one number a sequence, or a token.

    In float32 at least; 0 for tokens not counted.
    """

    def checked(params: Params, tokens: Int[Array, "B T"], where: Bool[Array, "B T"]):
        log_pi = log_prob_fn(params, tokens, where)
        expected = tokens.shape if of_tokens else tokens.shape[:1]
        if getattr(log_pi, "shape", None) != expected:
            given = (
                f"shape {list(log_pi.shape)}"
                if hasattr(log_pi, "shape")
                else f"a {type(log_pi).__name__}"
            )
            raise ValueError(
                f"The policy's function must return one log-probability a "
                f"{'token' if of_tokens else 'sequence'}, for tokens of shape {list(tokens.shape)} "
                f"an array of shape {list(expected)}; it returned {given}."
            )
        log_pi = jnp.asarray(log_pi, float_dtype(log_pi))
        return jnp.where(where, log_pi, 0.0) if of_tokens else log_pi

    return checked


_KINDS = {
    "optimizer": optax.GradientTransformation,
    "divergence": FDivergence,
    "log_z": RunningLogMean,
}


def check_options(
    *, microbatch_size: int | None = None, num_contexts: int | None = None, **parts: object
) -> None:
    """What all tuners are made of; above all, whether the functions that make a part were called.

    Raises:
        ValueError: if a part has not the functions of its kind, or a number is not one of how many.
    """
    for name, given in parts.items():
        kind = _KINDS[name]
        if not all(hasattr(given, field) for field in kind._fields):
            function = getattr(given, "__name__", None)
            hint = f"the function {function}: call it" if function else repr(given)
            raise ValueError(f"{name} must be a {kind.__name__}, got {hint}.")
    if microbatch_size is not None:
        check_counts(microbatch_size=microbatch_size)
    if num_contexts is not None:
        check_counts(num_contexts=num_contexts)


def check_counts(**counts: int) -> None:
    """Options that say how many.

    Raises:
        ValueError: if one is not an integer of at least 1.
    """
    for name, value in counts.items():
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be at least 1, a whole number; got {value!r}.")
