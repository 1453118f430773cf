"""The door of every public function that takes arrays: shapes and dtypes.

Broadcasting would turn ``[C, N]``, or ``[N]`` beside ``[N, 1]``, into wrong numbers without a word.
Shapes are static, so the checks cost nothing once compiled, and hold under `jit`, `vmap` and
`shard_map`, each of which shows a function the shape that it really works on.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fjax.types import Array

_Function = TypeVar("_Function", bound=Callable[..., Any])


def one_axis(**arrays: Array | None) -> tuple:
    """The arrays as one number a sample, each ``[N]``, in one dtype of at least float32.

    None stays None.

    Args:
        arrays: by the names that the caller's users know them by.

    Raises:
        ValueError: if one has another number of axes, or they differ in length.

    >>> [x.dtype.name for x in one_axis(log_pi=jnp.zeros(2, jnp.bfloat16), log_p=jnp.zeros(2))]
    ['float32', 'float32']
    """
    given = _given(arrays)
    if any(np.ndim(x) != 1 for x in given.values()):
        raise ValueError(
            f"{_listed(given)} must be one number a sample, of shape [N]; got {_shapes(given)}. "
            f"For several contexts or "
            "groups, map the function over them with jax.vmap."
        )
    return same_shape(**arrays)


def same_shape(**arrays: Array | None) -> tuple:
    """The arrays of an elementwise function, all of one shape, in one dtype.

    That is float32 at least. None stays None.

    Args:
        arrays: by the names that the caller's users know them by.

    Raises:
        ValueError: if their shapes differ; they are not broadcast.

    >>> same_shape(chosen_log_pi=jnp.zeros(3), rejected_log_pi=jnp.zeros((3, 1)))
    Traceback (most recent call last):
    ValueError: chosen_log_pi and rejected_log_pi must have one shape; got [3] and [3, 1]. ...
    """
    given = _given(arrays)
    if len({np.shape(x) for x in given.values()}) > 1:
        raise ValueError(
            f"{_listed(given)} must have one shape; got {_shapes(given)}. They are not broadcast: "
            f"for several contexts or "
            "groups, map the function over them with jax.vmap."
        )
    dtype = float_dtype(*given.values())
    return tuple(None if x is None else jnp.asarray(x, dtype) for x in arrays.values())


def float_dtype(*arrays: Array):
    """What these are computed in: the widest of their dtypes, and at least float32.

    >>> small, mask, half = (jnp.zeros(1, dtype) for dtype in (jnp.int8, bool, jnp.float16))
    >>> float_dtype(small).name, float_dtype(mask, half).name
    ('float32', 'float32')
    """
    return jnp.result_type(jnp.float32, *(jnp.asarray(x).dtype for x in arrays))


@overload
def as_mask(where: Array, like: Array, *, name: str = ...) -> Array: ...
@overload
def as_mask(where: None, like: Array, *, name: str = ...) -> None: ...
@overload
def as_mask(where: Array | None, like: Array, *, name: str = ...) -> Array | None: ...
def as_mask(where: Array | None, like: Array, *, name: str = "where") -> Array | None:
    """``where`` as booleans of the shape of ``like``; None stays None.

    Integers count where they are not 0.

    Args:
        where: True = counted.
        like: what it is a mask of.
        name: what the caller's users know it by.

    Raises:
        ValueError: if it has another shape, or holds floats.

    >>> as_mask(jnp.array([1, 0]), jnp.zeros(2)).tolist()
    [True, False]
    """
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.shape != np.shape(like):
        raise ValueError(
            f"{name} must have the shape of what it masks, {_shape(like)}; got {_shape(where)}. "
            f"For several contexts or "
            "groups, map the function over them with jax.vmap."
        )
    if where.dtype != bool and not jnp.issubdtype(where.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be booleans, True = counted; got {where.dtype.name}. Compare first, as "
            f"in w > 0."
        )
    return where.astype(bool)


def as_token_arrays(where: Array | None, **arrays: Array) -> tuple:
    """The arrays ``[N, T]`` in a common dtype, 0 where not counted; then ``where``.

    What is not counted may be anything, NaN included: replaced before a formula sees it, it reaches
    no gradient either.

    Args:
        where: tokens that count; None means all.
        arrays: by the names that the caller's users know them by.

    Raises:
        ValueError: if the shapes differ, or are not of sequences by tokens.

    >>> token_log_pi = jnp.array([[-1.0, jnp.nan]])
    >>> [x.tolist() for x in as_token_arrays(jnp.array([[1, 0]]), token_log_pi=token_log_pi)]
    [[[-1.0, 0.0]], [[True, False]]]
    """
    kept = same_shape(**arrays)
    if np.ndim(kept[0]) != 2:
        raise ValueError(
            f"{_listed(arrays)} must be one number a token, of shape [N, T]; got "
            f"{_shapes(arrays)}. For several contexts or "
            "groups, map the function over them with jax.vmap."
        )
    mask = as_mask(where, kept[0])
    if mask is None:
        mask = jnp.ones_like(kept[0], bool)
    return *(jnp.where(mask, x, 0.0) for x in kept), mask


def by_feature(features: Array, **of_each: Array) -> tuple[Array, Array]:
    """Features ``[N, K]``, and what there is one of for each, in a common dtype.

    That is float32 at least.

    Args:
        features: one row a sample.
        of_each: one array, by the name that the caller's users know it by.

    Raises:
        ValueError: if they are not of these shapes.

    >>> [x.dtype.name for x in by_feature(jnp.zeros((3, 2), bool), moments=jnp.zeros(2))]
    ['float32', 'float32']
    """
    ((name, values),) = of_each.items()
    if (
        np.ndim(features) != 2
        or np.ndim(values) != 1
        or np.shape(features)[1] != np.shape(values)[0]
    ):
        raise ValueError(
            f"features must be [N, K], one row a sample, and {name} [K], one a feature; got "
            f"{_shape(features)} and {_shape(values)}. For several contexts, map the function over "
            f"them with jax.vmap."
        )
    dtype = float_dtype(features, values)
    return jnp.asarray(features, dtype), jnp.asarray(values, dtype)


def one_a_row(features: Array, **arrays: Array) -> Array:
    """One number for each row of the features, in a dtype that holds both.

    Args:
        features: ``[N, K]``.
        arrays: one array, by the name that the caller's users know it by.

    Raises:
        ValueError: if there is not one a row.

    >>> one_a_row(jnp.zeros((3, 2)), log_weights=jnp.zeros(2))
    Traceback (most recent call last):
    ValueError: log_weights must be one number a row of features, which are [3, 2]; got [2]. ...
    """
    ((name, values),) = arrays.items()
    if np.shape(values) != features.shape[:1]:
        raise ValueError(
            f"{name} must be one number a row of features, which are {_shape(features)}; got "
            f"{_shape(values)}. For several "
            "contexts, map the function over them with jax.vmap."
        )
    return jnp.asarray(values, float_dtype(features, values))


def is_concrete(value: object) -> bool:
    """Whether the number can be looked at: not while a transformation traces it."""
    return not isinstance(value, Tracer)


def positive(**values: float | Array) -> None:
    """Options such as β: one number each, above 0 and finite.

    Of one that is traced only the shape can be checked.

    Args:
        values: by the names that the caller's users know them by.

    Raises:
        ValueError: for an array of several numbers, or another number.

    >>> positive(beta=0.0)
    Traceback (most recent call last):
    ValueError: beta must be positive, got 0.0.
    """
    for name, value in values.items():
        one_number(**{name: value})
        if is_concrete(value) and not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{name} must be positive{' and finite' * bool(value > 0)}, got {value}."
            )


def one_number(**values: float | Array) -> None:
    """Options that are one number each, traced or not.

    An array of them would be broadcast against the samples.

    Args:
        values: by the names that the caller's users know them by.

    Raises:
        ValueError: for an array of several.

    >>> one_number(log_beta=jnp.zeros(3))
    Traceback (most recent call last):
    ValueError: log_beta must be one number, got shape [3]. For several, map the function over ...
    """
    for name, value in values.items():
        if np.shape(value) != ():
            raise ValueError(
                f"{name} must be one number, got shape {_shape(value)}. For several, map the "
                f"function over them with jax.vmap."
            )


def made(divergence: object) -> None:
    """A divergence is given, and not the function that makes it.

    Raises:
        ValueError: for anything else.

    >>> from fjax import jensen_shannon
    >>> made(jensen_shannon)
    Traceback (most recent call last):
    ValueError: divergence must be an FDivergence; jensen_shannon is a function that makes one: ...
    """
    if hasattr(divergence, "generator") and hasattr(divergence, "derivative"):
        return
    if callable(divergence):
        name = getattr(divergence, "__name__", "it")
        raise ValueError(
            f"divergence must be an FDivergence; {name} is a function that makes one: "
            f"divergence={name}()."
        )
    raise ValueError(
        f"divergence must be an FDivergence, as fjax.jensen_shannon() makes one; got "
        f"{divergence!r}."
    )


def predicted(where: Array, *, start: int = 1) -> Array:
    """``where``, if it counts no column before ``start``; nothing predicts the token of column 0.

    A traced ``where`` passes: its values are not known yet, and whoever sums over it gives NaN.

    Raises:
        ValueError: if it counts one, and is not traced.

    >>> predicted(jnp.array([[True, True]]))
    Traceback (most recent call last):
    ValueError: where counts column 0 of row 0, ...
    """
    # NumPy: within jit, jax would trace
    if not is_concrete(where) or not (early := np.asarray(where)[..., :start]).any():
        return where
    *row, column = map(int, np.argwhere(early)[0])
    raise ValueError(
        f"where counts column {column}{''.join(f' of row {i}' for i in row)}, but nothing predicts "
        f"a token before column {start}: count completions only, each behind a prompt of at least "
        f"one token (the end-of-sequence token will do)."
    )


def renamed(**new_names: str) -> Callable[[_Function], _Function]:
    """A function whose keywords have other names than before; the old ones go on working.

    Args:
        new_names: by the old ones.

    >>> @renamed(clip="clip_ratio")
    ... def bounds(*, clip_ratio):
    ...     return clip_ratio
    >>> bounds(clip=(0.1, 0.2))
    (0.1, 0.2)
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args, **kwargs):
            moved = {new: kwargs.pop(old) for old, new in new_names.items() if old in kwargs}
            return function(*args, **kwargs, **moved)  # both names at once: Python's TypeError

        return call  # pyright: ignore[reportReturnType]

    return decorate


def _given(arrays):
    return {name: x for name, x in arrays.items() if x is not None}


def _listed(given) -> str:
    *names, last = given
    return f"{', '.join(names)} and {last}" if names else last


def _shapes(given) -> str:
    *shapes, last = map(_shape, given.values())
    return f"{', '.join(shapes)} and {last}" if shapes else last


def _shape(x) -> str:
    return str(list(np.shape(x)))
