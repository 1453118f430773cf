"""Meshes: how parameters, caches and batches are sharded over several devices.

A mesh has three axes, any of which may be of size 1:

    data    shards the rows of a batch; every device has all parameters
    fsdp    shards the rows too, and each matrix, which is gathered when it is used
    tensor  shards heads and hidden units: every device has all rows, and a part of their work

Programs are written as for one device, over whole arrays, and XLA partitions them by the shardings
of their arguments (JAX's global view). So shardings are said here, by the paths of a tree, and
nothing else needs to know of a mesh; one device is the mesh of one.

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
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from fjax._trees import name_leaves
from fjax.types import PyTree

__all__ = [
    "AXES",
    "ROWS",
    "Divided",
    "Rules",
    "check_rows",
    "devices_of",
    "divide",
    "gather_all",
    "jit_for",
    "jit_update",
    "make_mesh",
    "make_shardings",
    "place",
    "replicate",
    "row_devices",
    "save_all_but_gathered",
    "spread_rows",
]

AXES = ("data", "fsdp", "tensor")
"""Of every mesh, in the order of the devices: the tensor axis needs the fastest links."""

ROWS = PartitionSpec(("data", "fsdp"))
"""Of a batch: its rows are sharded over both axes."""

LARGE = 2**26
"""Bytes of arrays that an update closes over from which on they are arguments; see `jit_update`."""

Rules = Sequence[tuple[str, tuple[PartitionSpec, ...]]]
"""(regular expression, partition specs) pairs. The first pair whose expression is found in a leaf's
path gives its sharding: the first of the specs that divides its shape. A leaf that matches none is
replicated."""


def make_mesh(shape: str | Mapping[str, int] = "", *, devices: Sequence[Any] | None = None) -> Mesh:
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
    """The sharding of each leaf of a tree, by its path.

    Optimiser state and gradients have the parameters' paths at the end of their own, and so are
    sharded as these are.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.
        rules: see `Rules`.
        mesh: as `make_mesh` makes it.

    Returns:
        A `jax.sharding.NamedSharding` for each leaf.

    Raises:
        ValueError: if no spec of a leaf's rule divides its shape, with the leaf.

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
        f"{path} of shape {list(shape)} cannot be sharded over a mesh of "
        f"{_spell(dict(mesh.shape))}: its specs are {', '.join(str(tuple(s)) for s in places)}. "
        f"Take sizes that divide its sides."
    )


def _devices_along(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes)


def place(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """The arrays of a tree, each sharded as its rule says; see `make_shardings`.

    Parameters that no single device can hold are best made in their shards:
    ``jax.jit(make, out_shardings=make_shardings(...))``, or `fjax.from_pretrained` with ``mesh``.
    """
    return jax.device_put(tree, make_shardings(tree, rules, mesh))


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["divided", "whole"])
@dataclasses.dataclass(frozen=True)
class Divided:
    """A parameter that is sharded over fsdp, to be gathered where it is used and not before.

    Attributes:
        parts: the array, of its whole shape.
        divided: its sharding.
        whole: its sharding while it is used: the same without fsdp.
    """

    parts: Any
    divided: NamedSharding
    whole: NamedSharding

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.parts.shape

    def gather(self, dtype: DTypeLike) -> Any:
        """The gathered array; the gradient is sharded again."""
        # Cast first: what is moved and held has the dtype of the computation. The barrier and the
        # first constraint keep it sharded up to here, and its gradient from here on: XLA would
        # gather it earlier, and slice the gradient only where the optimiser takes it.
        parts = jax.lax.optimization_barrier(self.parts.astype(dtype))
        parts = jax.lax.with_sharding_constraint(parts, self.divided)
        return jax.lax.with_sharding_constraint(parts, self.whole)


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: saves everything of a block but what was gathered for it.

    The backward pass then gathers it once more, and no device ever holds all parameters.
    """
    return primitive.name != "sharding_constraint"


def divide(params: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
    """Parameters with a `Divided` in place of each leaf that is sharded over fsdp.

    For models that gather what they use, as fjax's own do.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def leaf(x, sharding):
        spec = sharding.spec
        whole = PartitionSpec(*(_without_fsdp(axes) for axes in spec))
        return x if whole == spec else Divided(x, sharding, NamedSharding(mesh, whole))

    return jax.tree.map(leaf, params, make_shardings(params, rules, mesh))


def gather_all(params: PyTree) -> PyTree:
    """What `divide` has divided, whole again, for models that do not gather themselves."""
    is_divided = lambda x: isinstance(x, Divided)  # noqa: E731
    whole = lambda x: x.gather(x.parts.dtype) if is_divided(x) else x  # noqa: E731
    return jax.tree.map(whole, params, is_leaf=is_divided)


def _without_fsdp(axes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    kept = [axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis != "fsdp"]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def row_devices(mesh: Mesh) -> int:
    """Shards that the rows of a batch make."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, what: str) -> None:
    """ValueError unless the rows can be divided equally.

    >>> check_rows(make_mesh("data=-1", devices=jax.devices()[:1]), 3, "samples")
    """
    parts = row_devices(mesh)
    if rows % parts:
        raise ValueError(
            f"{what} ({rows}) must be a multiple of {parts}, since the rows of a batch are "
            f"sharded over data × fsdp = {mesh.shape['data']} × {mesh.shape['fsdp']} devices."
        )


def spread_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of a tree with their first axis sharded over data and fsdp; scalars replicated.

    In a compiled program that is a constraint, from which XLA infers what depends on it.

    >>> spread_rows(np.zeros((2, 3)), make_mesh("data=-1", devices=jax.devices()[:1])).shape
    (2, 3)
    """

    def spread(x):
        spec = ROWS if np.ndim(x) else PartitionSpec()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(spread, tree)


def replicate(tree: PyTree) -> PyTree:
    """A tree with its arrays that are on no mesh replicated over the mesh of the others.

    A tree on one device stays as it is. An optimiser's counters are made on one device, and come
    out of the first update on all of them: the second would be compiled anew.
    """
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_on_mesh(leaf)}
    if not meshes:
        return tree
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())
    return jax.tree.map(lambda x: x if _is_on_mesh(x) else jax.device_put(x, everywhere), tree)


def _is_on_mesh(leaf: Any) -> bool:
    sharding = getattr(leaf, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.size > 1


def devices_of(tree: PyTree) -> list[Any]:
    """The devices of a tree's arrays, or of its shapes; else the default one.

    >>> devices_of({"w": np.zeros(2)}) == jax.devices()[:1]
    True
    """
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    found = {device for place in places if place is not None for device in place.device_set}
    return sorted(found, key=lambda device: device.id) or jax.devices()[:1]


def jit_update(update: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """``jax.jit`` of (state, ...) -> (state, info), with the state donated.

    On a mesh the new state keeps the shardings of the old one. Left to itself, XLA would choose
    others for small arrays, and compile the next step anew.

    An update may close over arrays, as that of adapters does over the base model. Large ones become
    arguments of the program: of constants XLA keeps copies, and computes with them as it compiles.
    """
    programs: dict[Any, Callable] = {}

    def apply(state, *args):
        key = _signature(state, args)
        if key not in programs:
            programs[key] = _compiled(update, state, *args)
        return programs[key](state, *args)

    return apply


def _signature(state: PyTree, args: PyTree) -> tuple:
    """What a program is compiled for: structure, shapes and dtypes; on a mesh the places, too."""
    leaves, structure = jax.tree.flatten((state, args))
    kinds = tuple(jax.typeof(leaf) for leaf in leaves)
    on_mesh = any(map(_is_on_mesh, jax.tree.leaves(state)))
    places = tuple(leaf.sharding for leaf in jax.tree.leaves(state)) if on_mesh else None
    return structure, kinds, places


def _compiled(update: Callable, state: PyTree, *args: PyTree) -> Callable:
    program = jit_for(update, state)
    traced = program.trace(state, *args)  # once: the call that follows takes it from there
    arrays = traced.jaxpr.consts
    if sum(array.nbytes for array in arrays) < LARGE:
        return program
    structure = jax.tree.structure(traced.out_info)

    def of_arrays(state, arrays, *args):
        fn = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr.jaxpr, arrays))
        return structure.unflatten(fn(*jax.tree.leaves((state, args))))

    program = jit_for(of_arrays, state)
    return lambda state, *args: program(state, arrays, *args)


def jit_for(update: Callable[..., tuple[Any, Any]], state: PyTree) -> Any:
    """`jit_update` for a state of these shardings, arrays or shapes; the result can be lowered."""
    compiled = partial(jax.jit, update, donate_argnums=0)
    if not any(map(_is_on_mesh, jax.tree.leaves(state))):
        return compiled()
    return compiled(out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))
