"""Meshes: how parameters, caches and batches lie along several devices.

A mesh has three axes, any of which may be 1:

    data    rows of a batch; every device has all parameters
    fsdp    rows of a batch, too, and a part of each matrix, which is gathered when it is used
    tensor  heads and hidden units: every device has all rows, and does a part of the work of each

Programs are written as for one device, over whole arrays, and XLA divides them by where their
arguments lie (JAX's global view). So this file says where things lie, by the paths of a tree, and
nothing else has to know of a mesh: one device is the mesh of one.

Source: Xu et al. 2021 (GSPMD, arXiv 2105.04663); Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054)
for fsdp; Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053), section 3, for tensor.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from fjax._trees import name_leaves
from fjax.types import PyTree

__all__ = [
    "AXES",
    "GATHERED_AGAIN",
    "ROWS",
    "Divided",
    "Rules",
    "check_rows",
    "devices_of",
    "divide",
    "jit_for",
    "jit_update",
    "make_mesh",
    "make_shardings",
    "place",
    "replicate",
    "row_devices",
    "spread_rows",
]

AXES = ("data", "fsdp", "tensor")
"""Of every mesh, in the order of the devices: the tensor axis needs the fastest links."""

ROWS = PartitionSpec(("data", "fsdp"))
"""Of a batch: its rows lie along both axes."""

Rules = Sequence[tuple[str, tuple[PartitionSpec, ...]]]
"""(regular expression, places) pairs. A leaf lies as the first pair says whose expression is in its
path: at the first of the places that divides its shape. A leaf that no pair knows is on all
devices alike."""


def make_mesh(
    shape: str | Mapping[str, int] = "", *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices, from ``"data=4,fsdp=2"``.

    Args:
        shape: size of each axis; those that are not named are 1, and one may be -1, which takes
            whatever devices are left. "" takes them all for data.
        devices: all of all processes by default.

    Raises:
        ValueError: for another axis, a size that is no whole number of 1 or more, or sizes whose
            product is not the number of devices.

    >>> mesh = make_mesh("fsdp=-1", devices=jax.devices()[:1])
    >>> dict(mesh.shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = _parse(shape) if isinstance(shape, str) else dict(shape)
    _check_axes(sizes, shape)
    sizes = sizes or {"data": -1}
    named = math.prod(size for size in sizes.values() if size != -1)
    rest = len(devices) // named
    sizes = {axis: rest if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"A mesh of {_spell(sizes)} takes {math.prod(sizes.values())} devices, and there are "
            f"{len(devices)}. Give sizes whose product is {len(devices)}; one of them may be -1, "
            f"for as many as are left."
        )
    sides = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(sides, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parse(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise ValueError(
                f"A mesh is given as axis=size,…, each axis once, as in data=4,fsdp=2; got "
                f"{text!r}. Axes are {', '.join(AXES)}."
            )
        sizes[axis] = int(size)
    return sizes


def _check_axes(sizes: Mapping[str, int], given: Any) -> None:
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(
            f"A mesh has the axes {', '.join(AXES)}; got {', '.join(map(repr, unknown))} in "
            f"{given!r}."
        )
    open_ended = [axis for axis, size in sizes.items() if size == -1]
    if len(open_ended) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"The size of an axis is 1 or more, or for one of them -1, which takes whatever "
            f"devices are left; got {given!r}."
        )


def _spell(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def make_shardings(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Where each leaf of a tree of arrays, or of their shapes, is to lie.

    Optimiser state and gradients have the paths of the parameters at their ends, and so lie as
    these do.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
        rules: see `Rules`.
        mesh: as `make_mesh` makes it.

    Returns:
        A `jax.sharding.NamedSharding` for each leaf.

    Raises:
        ValueError: if no place of a leaf's rule divides its shape, with the leaf.

    >>> mesh = make_mesh("fsdp=-1", devices=jax.devices()[:1])
    >>> kernel = {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}
    >>> rules = [("kernel", (PartitionSpec("fsdp", "tensor"),))]
    >>> tuple(make_shardings(kernel, rules, mesh)["kernel"].spec)
    ('fsdp', 'tensor')
    """
    found = (
        _place_of(path, np.shape(leaf), rules, mesh) for path, leaf in name_leaves(tree).items()
    )
    return jax.tree.structure(tree).unflatten(NamedSharding(mesh, spec) for spec in found)


def _place_of(path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh) -> PartitionSpec:
    places = next((places for pattern, places in rules if re.search(pattern, path)), None)
    if places is None:
        return PartitionSpec()
    for spec in places:
        if len(spec) <= len(shape) and all(
            side % _devices_along(mesh, axes) == 0 for side, axes in zip(shape, spec, strict=False)
        ):
            return spec
    raise ValueError(
        f"{path} of shape {list(shape)} cannot be divided along a mesh of "
        f"{_spell(dict(mesh.shape))}: its places are {', '.join(str(tuple(s)) for s in places)}. "
        f"Take sizes that divide its sides."
    )


def _devices_along(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes)


def place(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The arrays of a tree, each where its rule says.

    See `make_shardings`. For parameters that no single device can hold, have them made there:
    ``jax.jit(make, out_shardings=make_shardings(...))``, or `fjax.from_pretrained` with ``mesh``.
    """
    return jax.device_put(tree, make_shardings(tree, rules, mesh))


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["divided", "whole"])
@dataclasses.dataclass(frozen=True)
class Divided:
    """A parameter in parts along fsdp, to be gathered where it is used and not before.

    Attributes:
        parts: the array, of its whole shape.
        divided: where its parts are.
        whole: where it is when it is used: as ``divided``, but for fsdp.
    """

    parts: Any
    divided: NamedSharding
    whole: NamedSharding

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.parts.shape

    def gather(self, dtype: DTypeLike) -> Any:
        """The whole, for as long as it is used; its gradient is in parts again."""
        # Cast first: what is moved and held is of the computation's dtype. And in parts until here,
        # as its gradient is from here on: XLA would gather it where it comes from otherwise.
        parts = jax.lax.optimization_barrier(self.parts.astype(dtype))
        parts = jax.lax.with_sharding_constraint(parts, self.divided)
        return jax.lax.with_sharding_constraint(parts, self.whole)


def GATHERED_AGAIN(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keeps everything of a block but what was gathered for it.

    The backward pass then gathers it once more, and no device ever holds all parameters.
    """
    return primitive.name != "sharding_constraint"


def divide(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Parameters with a `Divided` in place of each leaf that has parts along fsdp.

    For models that gather what they use, as fjax's own do.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def leaf(x, sharding):
        spec = sharding.spec
        whole = PartitionSpec(*(_without_fsdp(axes) for axes in spec))
        return x if whole == spec else Divided(x, sharding, NamedSharding(mesh, whole))

    return jax.tree.map(leaf, params, make_shardings(params, rules, mesh))


def _without_fsdp(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    kept = [axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != "fsdp"]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def row_devices(mesh: Mesh) -> int:
    """Parts into which the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """ValueError unless the rows can be divided equally.

    >>> check_rows(make_mesh("data=-1", devices=jax.devices()[:1]), 3, "samples")
    """
    parts = row_devices(mesh)
    if rows % parts:
        raise ValueError(
            f"{what} ({rows}) must be a multiple of {parts}, for the rows of a batch lie along "
            f"data × fsdp = {mesh.shape['data']} × {mesh.shape['fsdp']} devices."
        )


def spread_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a tree with their first axis along data and fsdp; scalars on all devices.

    In a compiled program a constraint, from which XLA finds how all that depends on it lies.

    >>> spread_rows(np.zeros((2, 3)), make_mesh("data=-1", devices=jax.devices()[:1])).shape
    (2, 3)
    """

    def spread(x):
        spec = ROWS if np.ndim(x) else PartitionSpec()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(spread, tree)


def replicate(tree: PyTree) -> PyTree:
    """Arrays that lie on no mesh, on all devices of the one that the others lie on.

    A tree of one device stays as it is. Scalars that an optimiser counts with are made without
    their place, and a program that finds them elsewhere in its second call is compiled once more.
    """
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_on_mesh(leaf)}
    if not meshes:
        return tree
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    return jax.tree.map(lambda x: x if _is_on_mesh(x) else jax.device_put(x, everywhere), tree)


def _is_on_mesh(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.size > 1


def devices_of(tree: PyTree) -> list[jax.Device]:
    """What the arrays of a tree lie on, or would by their shapes; else the default device.

    >>> devices_of({"w": np.zeros(2)}) == jax.devices()[:1]
    True
    """
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    found = {device for place in places if place is not None for device in place.device_set}
    return sorted(found, key=lambda device: device.id) or jax.devices()[:1]


def jit_update(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """``jax.jit`` of (state, ...) -> (state, info), which is given the state to keep.

    On a mesh the new state lies where the old one lay; left to itself, XLA would put small arrays
    wherever it had made them, and compile the next step anew.
    """
    programs: dict[Any, Callable] = {}

    def apply(state, *args):
        leaves = jax.tree.leaves(state)
        key = tuple(leaf.sharding for leaf in leaves) if any(map(_is_on_mesh, leaves)) else None
        if key not in programs:
            programs[key] = jit_for(update, state)
        return programs[key](state, *args)

    return apply


def jit_for(update: Callable[..., tuple[Any, Any]], state: PyTree) -> Any:
    """The same for a state that lies as this one does, of arrays or shapes; it can be lowered."""
    compiled = partial(jax.jit, update, donate_argnums=0)
    if not any(map(_is_on_mesh, jax.tree.leaves(state))):
        return compiled()
    return compiled(out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
