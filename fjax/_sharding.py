"""Explicit mesh axes, where an array's type says how it is spread.

Many operations must then be told how their result is.

What is to work on rows spread over such an axis goes through `spread_as`: within, the compiler
chooses, as it does on every other mesh, and the results are spread as the rows are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, auto_axes, use_abstract_mesh

from fjax.types import Array


def spread_as(rows: Array, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, with results spread along axis 0 as ``rows`` is.

    Only where ``args`` are spread over Explicit axes.

    >>> spread_as(jnp.zeros(2), lambda x, y: x + y, jnp.ones(2), 2).tolist()
    [3.0, 3.0]
    """
    leaves, tree = jax.tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    mesh = next(
        (jax.typeof(leaves[i]).sharding.mesh for i in places if _is_spread(leaves[i])), None
    )
    if mesh is None:
        return function(*args)
    structure: Any = None
    is_row: list[bool] = []

    def within(arrays: list[Array]) -> tuple[list[Array], list[Array]]:
        nonlocal structure, is_row
        given = dict(zip(places, arrays, strict=True))
        found, structure = jax.tree.flatten(
            function(*tree.unflatten([given.get(i, x) for i, x in enumerate(leaves)]))
        )
        is_row = [jnp.ndim(x) > 0 for x in found]
        return [x for x in found if jnp.ndim(x)], [x for x in found if not jnp.ndim(x)]

    along = PartitionSpec(*jax.typeof(rows).sharding.spec[:1])
    with use_abstract_mesh(mesh):
        results: Any = auto_axes(within, out_sharding=(along, PartitionSpec()))(
            [leaves[i] for i in places]
        )
    arrays, scalars = map(iter, results)
    return structure.unflatten([next(arrays) if row else next(scalars) for row in is_row])


def _is_spread(array: Array) -> bool:
    # Only Explicit axes are in a type: those of other meshes read None.
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)


def together(x: Array) -> Array:
    """On all devices alike, where explicit sharding has spread it.

    What any other sharding does with it is XLA's business.

    Statistics are of numbers a sample, so bringing them together costs nothing beside the model
    that made them.
    """
    spread = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jax.sharding.reshard(x, jax.P(*[None] * x.ndim)) if spread else x
