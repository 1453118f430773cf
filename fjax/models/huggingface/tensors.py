"""Weights by name in safetensors files, whole or in shards.

And whether they are those of the configuration.

A family names its tensors as a checkpoint with a head has them; a checkpoint of the body alone
leaves out the family's prefix. So names are compared, and told in errors, without it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from fjax.models.base import Family, ModelConfig
from fjax.models.huggingface.folders import read_json
from fjax.models.huggingface.tokenizers import some
from fjax.sharding import make_shardings
from fjax.types import Array, Params

__all__ = ["load_params", "named_tensors", "param_shapes", "read_tensors", "write_tensors"]

_FLOATS = {"F16", "BF16", "F32", "F64"}
_SCORE = "score.weight"


class _Stored(NamedTuple):
    """A tensor in a file, unread: the name and the dtype as safetensors has them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def named_tensors(family: Family, params: Params) -> dict[str, Any]:
    """Leaves by their whole names in a checkpoint, in the order of the tree."""
    return {
        family.tensor_name(tuple(jax.tree_util.keystr((key,), simple=True) for key in path)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """One safetensors file."""
    import safetensors.flax

    safetensors.flax.save_file(dict(tensors), path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, Array]:
    """All of one safetensors file by their names there, in float32."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}.")
    return {tensor.name: _read(tensor, jnp.float32) for tensor in _headers(path)}


def param_shapes(
    family: Family, config: ModelConfig, dtype: DTypeLike, mesh: Mesh | None = None
) -> Params:
    """Shapes of the parameters, with their shardings over a mesh."""
    like = jax.eval_shape(lambda: family.init_params(config, jax.random.key(0), param_dtype=dtype))
    if mesh is None:
        return like
    places = make_shardings(like, family.rules, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places
    )


def load_params(
    folder: Path,
    family: Family,
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    head: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Params, Array | None]:
    """The parameters and, if asked for, the kernel of a scalar head.

    On a mesh each device is given its part of a tensor, and nothing else of it is read for it.
    """
    stored = _list_tensors(folder, family.prefix)
    if config.depth > len(stored):  # before so many blocks are traced
        raise ValueError(
            f"The weights in {folder} are {len(stored)} tensors, too few for {config.depth} blocks."
        )
    like = param_shapes(family, config, dtype, mesh)
    if head:
        like = {name: tree for name, tree in like.items() if name != family.head}
    expected: dict[str, tuple[int, ...]] = {
        name.removeprefix(family.prefix): leaf.shape
        for name, leaf in named_tensors(family, like).items()
    }
    if head:
        expected[_SCORE] = (1, config.width)
        _check_head(folder, stored, expected[_SCORE])
    _check_tensors(folder, family, config, expected, stored)
    places = {
        name.removeprefix(family.prefix): leaf.sharding
        for name, leaf in named_tensors(family, like).items()
    }
    found = {name: _read(stored[name], dtype, places.get(name)) for name in expected}
    bad = [name for name, leaf in found.items() if not bool(jnp.isfinite(leaf).all())]
    if bad:
        raise ValueError(
            f"Tensors in {folder} have values that are not finite in {jnp.dtype(dtype)}: "
            f"{some(bad)}."
        )
    score = found.pop(_SCORE).T if head else None
    if not head:
        _check_tied(folder, family, config, stored)
    return jax.tree.unflatten(jax.tree.structure(like), list(found.values())), score


def _check_head(folder: Path, stored: Mapping[str, _Stored], shape: tuple[int, ...]) -> None:
    score = stored.get(_SCORE)
    if score is None or score.shape != shape:
        found = "none" if score is None else f"one of shape {score.shape}"
        raise ValueError(
            f"{folder} is no reward model: it needs a {_SCORE} of shape {shape}, and has {found}."
        )


def _check_tensors(
    folder: Path,
    family: Family,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, _Stored],
) -> None:
    """Whether the weights are those of the configuration, no more and no less.

    And whether they are numbers that can be computed with.
    """
    known = expected.keys() | family.tied(config).keys()
    missing = sorted(expected.keys() - stored.keys())
    more = [n for n in sorted(stored.keys() - known) if not re.fullmatch(family.buffers, n)]
    shared = {name: stored[name] for name in expected if name in stored}
    wrong = [
        f"{name} is {tensor.shape}, not {expected[name]}"
        for name, tensor in shared.items()
        if tensor.shape != expected[name]
    ]
    coded = [f"{name} is {t.dtype}" for name, t in shared.items() if t.dtype not in _FLOATS]
    weights, tensors, this = f"The weights in {folder}", f"Tensors in {folder}", family.name
    floats = ", ".join(sorted(_FLOATS))
    for found, what in (
        (missing, f"{weights} lack {len(missing)} tensors of this {this}"),
        (more, f"{weights} have {len(more)} tensors that this {this} has not"),
        (wrong, f"{tensors} do not have the shapes of its config.json"),
        (coded, f"{tensors} are not of {floats}, quantised perhaps"),
    ):
        if found:
            raise ValueError(f"{what}: {some(found)}.")


def _check_tied(
    folder: Path, family: Family, config: ModelConfig, stored: Mapping[str, _Stored]
) -> None:
    """Whether what a checkpoint may have twice, a head beside the embedding, is twice the same."""
    tied = read_json(folder / "config.json").get("tie_word_embeddings", True)
    for copy, original in family.tied(config).items():
        if copy not in stored and not tied:
            raise ValueError(
                f"{folder} has tie_word_embeddings=False and no {copy}, so that its logits are "
                f"not known."
            )
        if copy in stored and not bool(
            jnp.array_equal(_read(stored[copy], jnp.float32), _read(stored[original], jnp.float32))
        ):
            raise ValueError(
                f"{folder} has a {copy} that differs from {original}; fjax computes this "
                f"{family.name} with tied embeddings only."
            )


def _list_tensors(folder: Path, prefix: str) -> dict[str, _Stored]:
    """Every tensor of the folder by its name without the prefix.

    The weights themselves are not read.
    """
    tensors: dict[str, _Stored] = {}
    for file, listed in _shards(folder).items():
        found = _headers(folder / file)
        differing = sorted(listed ^ {tensor.name for tensor in found}) if listed else []
        if differing:
            raise ValueError(
                f"{folder / file} does not have the tensors that the index says, as to "
                f"{some(differing)}."
            )
        for tensor in found:
            name = tensor.name.removeprefix(prefix)
            if tensors.setdefault(name, tensor) is not tensor:
                raise ValueError(
                    f"The weights in {folder} have {name} twice, as {tensors[name].name} and as "
                    f"{tensor.name}."
                )
    return tensors


def _shards(folder: Path) -> dict[str, set[str]]:
    """The files of the weights, and the tensors that the index says are in each.

    None where there is no index.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": set()}
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json. If it has "
            f"pytorch_model.bin, open it "
            "with transformers once and call save_pretrained, which writes safetensors."
        )
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in listed.values()
    ):
        raise ValueError(
            f"{index} has no weight_map from the names of tensors to those of files beside it."
        )
    shards = {
        file: {name for name in listed if listed[name] == file}
        for file in sorted(set(listed.values()))
    }
    for file in shards:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {file} that its index lists.")
    return shards


def _headers(path: Path) -> list[_Stored]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="flax") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                _Stored(path, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error


def _read(tensor: _Stored, dtype: DTypeLike, sharding: Sharding | None = None) -> Array:
    import safetensors

    # What the dtype does not reach becomes infinite, which is looked for afterwards.
    with safetensors.safe_open(tensor.file, framework="np") as file, np.errstate(over="ignore"):
        if sharding is None:
            return jnp.asarray(file.get_tensor(tensor.name).astype(dtype))
        part = file.get_slice(tensor.name)
        return jax.make_array_from_callback(
            tensor.shape, sharding, lambda index: np.asarray(part[index]).astype(dtype)
        )
