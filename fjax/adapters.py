"""Adapters: a change of low rank for each matrix of a model, which is trained in its place.

    W + (α/r) down · up,    W [in, out],  down [in, r],  up [r, out]

The base model's parameters stay as they are. What is trained, kept by the optimiser and saved is a
small tree of its own. Whoever samples, scores or exports merges it into whole parameters, or
attaches it to those of the base model, which are then the only ones that there are. There is
nothing to be changed in the model, the loss or the tuner: each is a function of parameters, and
`adapt` makes it one of adapters.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fjax._checks import positive
from fjax._trees import find_leaves, list_paths, name_leaves
from fjax.types import Array, Float, Params, PRNGKeyArray

__all__ = [
    "AdaptedMatrix",
    "Adapters",
    "adapt",
    "attach_lora",
    "init_lora",
    "is_adapted",
    "merge_attached",
    "merge_lora",
]

Adapters = dict[str, dict[str, Array]]
"""Path of a matrix in the parameters -> its change, ``{"down": [in, r], "up": [r, out]}``."""


class AdaptedMatrix(NamedTuple):
    """A matrix that stands for W + down · up, without the sum; see `attach_lora`.

    Attributes:
        matrix: W, of the base model.
        down: ``[in, r]``.
        up: ``[r, out]``, already times α/r.
    """

    matrix: Float[Array, "I O"]
    down: Float[Array, "I r"]
    up: Float[Array, "r O"]


def init_lora(params: Params, rng_key: PRNGKeyArray, *, rank: int, pattern: str = "") -> Adapters:
    """Adapters that change nothing yet: merged, they give the very parameters they are made for.

        down ~ N(0, 1/in),    up = 0

    At 0 the gradient moves ``up`` first; were both 0, neither would ever move. A leaf called
    ``weight`` is a matrix ``[out, in]``, as torch, Equinox and fjax's Llama have them, and so it is
    the other way round: ``up ~ N(0, 1/in)``, and ``down = 0``.

    Args:
        params: of the base model, any tree of arrays.
        rng_key: for what is drawn.
        rank: r of each change.
        pattern: a regular expression, such as ``"attn|mlp"``. Adapters are made for the matrices,
            leaves of two axes or more, whose path has it in it; "" makes them for all.

    Returns:
        Path -> ``{"down": [in, r], "up": [r, out]}``, in float32 at least: r·(in + out) numbers in
        place of in·out. A leaf of more axes, such as the kernel ``[D, H, K]`` of attention, counts
        as the matrix of its first axis by all others: its ``up`` is ``[r, H, K]``.

    Raises:
        ValueError: if the pattern is in no path, or in no matrix's; for a matrix that does not hold
            floats; and for a rank below 1, or above the smaller side of a matrix.

    >>> params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    >>> adapters = init_lora(params, jax.random.key(0), rank=2)
    >>> jax.tree.map(jnp.shape, adapters)
    {'kernel': {'down': (3, 2), 'up': (2, 4)}}

    Source: Hu et al. 2021, section 4.1.
    """
    matrices = _find_matrices(params, pattern)
    _check_rank(rank, matrices)
    keys = jax.random.split(rng_key, len(matrices))
    pairs = zip(matrices.items(), keys, strict=True)
    return {path: _begin(path, matrix, key, rank) for (path, matrix), key in pairs}


def merge_lora(
    params: Params,
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    alpha: float | Float[Array, ""] | None = None,
) -> Params:
    """Whole parameters: the base model's, changed by the adapters.

        W + (α/r) down · up

    Differentiable in both. With G the gradient of a loss in the merged matrix, those of the adapter
    are (α/r) G · upᵀ for ``down`` and (α/r) downᵀ · G for ``up``.

    Args:
        params: of the base model.
        adapters: as `init_lora` makes them for these parameters.
        alpha: α, which keeps a learning rate fit for all ranks; None takes α = r.

    Returns:
        Parameters of the same structure, shapes and dtypes; those without an adapter are the very
        same. The sum is taken in float32 at least and then rounded: in bfloat16, what is below half
        a unit of the base model's weight is lost. So leave the parameters in float32, and compute
        in bfloat16 if you like.

    Raises:
        ValueError: for an adapter of a path that is not in the parameters, or of another shape than
            the matrix there; and for an α that is not positive.

    >>> adapters = {"kernel": {"down": jnp.array([[1.0], [2.0]]), "up": jnp.array([[3.0, 0.0]])}}
    >>> merge_lora({"kernel": jnp.ones((2, 2))}, adapters)["kernel"].tolist()
    [[4.0, 1.0], [7.0, 1.0]]

    Source: Hu et al. 2021, equation 3.
    """
    return _with_adapters(_merge, params, adapters, alpha)


def attach_lora(
    params: Params,
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    alpha: float | Float[Array, ""] | None = None,
) -> Params:
    """The base model's parameters with the adapters beside them, for fjax's own models.

        x · W + (α/r)(x · down) · up

    The same function of the adapters as with `merge_lora`, up to rounding, and so the same
    gradient; but no second copy of W is made, and no gradient of its size. W is the base model's
    own array, which is there once for all that samples, scores and trains. To sample from a small
    model, merged parameters are a little faster.

    Args:
        params: of the base model.
        adapters: as `init_lora` makes them for these parameters.
        alpha: see `merge_lora`.

    Returns:
        The tree of ``params``, with an `AdaptedMatrix` where there is an adapter. The models that
        `fjax.from_pretrained` loads take it; what computes with arrays alone does not.

    Raises:
        ValueError: as `merge_lora` does.

    >>> adapters = {"kernel": {"down": jnp.array([[1.0], [2.0]]), "up": jnp.array([[3.0, 0.0]])}}
    >>> attached = attach_lora({"kernel": jnp.ones((2, 2))}, adapters, alpha=2.0)
    >>> attached["kernel"].up.tolist()
    [[6.0, 0.0]]

    Source: Hu et al. 2021, equation 3.
    """
    return _with_adapters(_attach, params, adapters, alpha)


def is_adapted(leaf: Any) -> bool:
    """Whether it is a matrix with an adapter beside it: ``jax.tree.map(..., is_leaf=is_adapted)``.

    >>> is_adapted(AdaptedMatrix(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2))))
    True
    """
    return isinstance(leaf, AdaptedMatrix)


def merge_attached(params: Params) -> Params:
    """Whole parameters, from those that `attach_lora` gives.

        W + down · up

    Args:
        params: with an `AdaptedMatrix` here and there, or a single one.

    Returns:
        The same with an array in its place, of the dtype of W; the other leaves are the very same.
        The sum is taken as in `merge_lora`.

    >>> matrix = AdaptedMatrix(jnp.ones((2, 2)), jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 0.0]]))
    >>> merge_attached({"kernel": matrix})["kernel"].tolist()
    [[4.0, 1.0], [7.0, 1.0]]

    Source: Hu et al. 2021, equation 3.
    """

    def whole(leaf):
        return _add(leaf.matrix, leaf.down, leaf.up, 1.0) if is_adapted(leaf) else leaf

    return jax.tree.map(whole, params, is_leaf=is_adapted)


def adapt(fn: Callable[..., Any], policy_of: Callable[[Any], Params]) -> Callable[..., Any]:
    """A function of adapters, from one of parameters: a loss, log π, logits.

        (adapters, ...) -> fn(policy_of(adapters), ...)

    Its gradient in the adapters is that of ``fn``, by the chain rule.

    Args:
        fn: its first argument is the parameters: a `fjax.types.LogProbFn`, a
            `fjax.types.LogitsFn`, or any other.
        policy_of: adapters -> parameters: ``partial(merge_lora, params)``, or one of your own;
            `fjax.runs.align` is given the same. To train a model of fjax's, `attach_lora` in place
            of `merge_lora` is faster.

    >>> from functools import partial
    >>> params = {"kernel": jnp.ones((2, 2))}
    >>> adapters = init_lora(params, jax.random.key(0), rank=1)
    >>> loss = adapt(lambda params, x: x @ params["kernel"] @ x, partial(merge_lora, params))
    >>> float(loss(adapters, jnp.ones(2)))
    4.0

    Source: Hu et al. 2021, section 4.
    """

    def adapted(adapters, *arrays, **options):
        return fn(policy_of(adapters), *arrays, **options)

    return adapted


def _find_matrices(params: Params, pattern: str) -> dict[str, Any]:
    """Path -> matrix, of floats."""
    found = find_leaves(params, pattern, name="pattern")
    matrices = {path: leaf for path, leaf in found.items() if np.ndim(leaf) >= 2}
    if not matrices:
        there = [path for path, leaf in name_leaves(params).items() if np.ndim(leaf) >= 2]
        raise ValueError(
            f"pattern {pattern!r} is in the path of no matrix, and adapters are for matrices. "
            f"There are {list_paths(there) or 'none'}."
        )
    for path, leaf in matrices.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Adapters change floats; {path} holds {leaf.dtype}. Give a pattern that leaves it "
                f"out, or keep it out of params, in the function that uses it."
            )
    return matrices


def _check_rank(rank: int, matrices: Mapping[str, Any]) -> None:
    sides = {path: min(_as_matrix(np.shape(matrix))) for path, matrix in matrices.items()}
    path = min(sides, key=sides.__getitem__)
    if not 1 <= rank <= sides[path]:
        raise ValueError(
            f"rank must be from 1 to the smaller side of every matrix, which is {sides[path]} for "
            f"{path} {list(np.shape(matrices[path]))}; got {rank}. Take another rank, or give a "
            f"pattern that leaves small matrices out."
        )


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _begin(path: str, matrix: Any, rng_key: PRNGKeyArray, rank: int) -> dict[str, Array]:
    rows, *others = matrix.shape
    dtype = jnp.result_type(jnp.float32, matrix.dtype)

    # Of this spread, what comes out of it is about as large as what comes in.
    def draw(shape, size):
        return jax.random.normal(rng_key, shape, dtype) / math.sqrt(size)

    if has_out_first(path):
        up = draw((rank, *others), math.prod(others))
        return {"down": jnp.zeros((rows, rank), dtype), "up": up}
    return {"down": draw((rows, rank), rows), "up": jnp.zeros((rank, *others), dtype)}


def has_out_first(path: str) -> bool:
    """Whether a matrix is ``[out, in]``, by the name of the leaf; a ``kernel`` is ``[in, out]``."""
    return path.rpartition("/")[2] == "weight"


def _with_adapters(
    change: Callable[..., Any], params: Params, adapters: Mapping, alpha: float | Array | None
) -> Params:
    """Each matrix that has an adapter as ``change`` makes it of both; the others as they are."""
    if alpha is not None:
        positive(alpha=alpha)
    named = name_leaves(params)
    check_belong(adapters, named)
    changed = (
        change(leaf, adapters[path], alpha) if path in adapters else leaf
        for path, leaf in named.items()
    )
    return jax.tree.structure(params).unflatten(changed)


def check_belong(adapters: Mapping[str, Mapping[str, Array]], named: Mapping[str, Any]) -> None:
    """ValueError unless each adapter is one of a matrix that there is."""
    for path, adapter in adapters.items():
        if path not in named:
            raise ValueError(
                f"There is an adapter of {path!r}, which is not in params. There are "
                f"{list_paths(named)}. Merge it into the parameters that it was made for."
            )
        down, up, shape = (np.shape(x) for x in (adapter["down"], adapter["up"], named[path]))
        if len(down) != 2 or down[1:] != up[:1] or (*down[:1], *up[1:]) != shape:
            raise ValueError(
                f"The adapter of {path!r} has down {list(down)} and up {list(up)}; for a matrix of "
                f"shape {list(shape)} these must be [in, r] and [r, out]. Merge it into the "
                f"parameters that it was made for."
            )


def _scale(adapter: Mapping[str, Array], alpha: float | Array | None) -> float | Array:
    return 1.0 if alpha is None else alpha / adapter["down"].shape[1]


def _attach(
    matrix: Any, adapter: Mapping[str, Array], alpha: float | Array | None
) -> AdaptedMatrix:
    return AdaptedMatrix(matrix, adapter["down"], _scale(adapter, alpha) * adapter["up"])


def _merge(
    matrix: Any, adapter: Mapping[str, Array], alpha: float | Array | None
) -> Float[Array, "..."]:
    return _add(matrix, adapter["down"], adapter["up"], _scale(adapter, alpha))


def _add(matrix: Any, down: Array, up: Array, scale: float | Array) -> Float[Array, "..."]:
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    change = jnp.tensordot(down, up, 1, precision=jax.lax.Precision.HIGHEST)
    return (matrix + scale * change).astype(matrix.dtype)
