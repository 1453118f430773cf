"""A language model on a mesh of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fjax.models.base import LanguageModel
from fjax.sharding import (
    Rules,
    divide,
    gather_all,
    make_shardings,
    place,
    row_devices,
    spread_rows,
)
from fjax.types import DecodeFn, LogitsFn, Params

__all__ = ["shard_model"]

Prepare = Callable[[Params], Params]
"""Parameters as they come -> as the model's functions take them."""


def shard_model(
    model: LanguageModel, mesh: Mesh, *, rules: Rules, gathers: bool = False
) -> LanguageModel:
    """The same model with its parameters, batches and caches sharded over a mesh.

    Its functions are the same up to rounding, and their callers need not know of the mesh: they
    constrain rows and caches, and XLA infers the rest. Rows whose number the mesh does not divide
    are computed on every device.

    Args:
        model: with its parameters on one device, or on the host.
        mesh: as `fjax.sharding.make_mesh` makes it.
        rules: of its family, see `fjax.sharding.Rules`.
        gathers: whether its functions take `fjax.sharding.Divided` parameters and gather each where
            it is used, as those of fjax's own families do. Else all are gathered beforehand.

    Raises:
        ValueError: if the mesh does not divide a parameter or the heads.
    """
    check_heads(model.config, mesh)
    placed = model._replace(params=place(model.params, rules, mesh))
    return on_mesh(placed, mesh, rules, gathers=gathers)


def on_mesh(
    model: LanguageModel, mesh: Mesh, rules: Rules, *, gathers: bool = True
) -> LanguageModel:
    """A model whose parameters are sharded already."""

    def prepare(params: Params) -> Params:
        divided = divide(params, rules, mesh)
        return divided if gathers else gather_all(divided)

    return model._replace(
        logits_fn=_logits_fn(model.logits_fn, mesh, prepare),
        decode_fn=_decode_fn(model.decode_fn, mesh, prepare),
        init_cache=_init_cache(model.init_cache, mesh),
        shardings=partial(make_shardings, rules=rules, mesh=mesh),
    )


def check_heads(config: Any, mesh: Mesh) -> None:
    """ValueError unless each device has as many heads."""
    tensor, heads = mesh.shape["tensor"], getattr(config, "heads", None)
    if heads is not None and heads % tensor:
        raise ValueError(
            f"The tensor axis of a mesh must divide the model's heads, and {tensor} does not "
            f"divide {heads}."
        )


def _rows(x: Any, mesh: Mesh) -> Any:
    return spread_rows(x, mesh) if len(x) % row_devices(mesh) == 0 else x


def _logits_fn(logits_fn: LogitsFn, mesh: Mesh, prepare: Prepare) -> LogitsFn:
    def apply(params, tokens, where=None, **options):
        logits = logits_fn(prepare(params), _rows(tokens, mesh), where, **options)
        return _rows(logits, mesh)

    return apply


def _decode_fn(decode_fn: DecodeFn, mesh: Mesh, prepare: Prepare) -> DecodeFn:
    def apply(params, tokens, cache, where=None):
        logits, cache = decode_fn(prepare(params), _rows(tokens, mesh), cache, where)
        # The whole vocabulary of a row on one device, to be drawn from as on one.
        return _rows(logits, mesh), _spread_cache(cache, mesh)

    return apply


def _init_cache(init_cache: Callable[[int, int], Any], mesh: Mesh) -> Callable[[int, int], Any]:
    return lambda rows, columns: _spread_cache(init_cache(rows, columns), mesh)


def _spread_cache(cache: Any, mesh: Mesh) -> Any:
    """Rows over data and fsdp; of keys and values ``[B, H, S, K]`` heads over tensor."""

    def spread(x):
        if np.ndim(x) == 0 or len(x) % row_devices(mesh):
            return x
        if np.ndim(x) != 4:
            return spread_rows(x, mesh)
        spec = PartitionSpec(("data", "fsdp"), "tensor")
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(spread, cache)
