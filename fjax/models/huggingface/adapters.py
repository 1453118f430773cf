"""Adapters in PEFT's format: a small folder, which `peft` opens on top of the base model.

There a change is of a module, and B · A:

    W [out, in] + (α/r) B · A,    A [r, in],  B [out, r]

Here it is of a leaf, and ``down · up``. Which is A is said by the name of the leaf: a ``kernel`` is
``[in, out]``, a ``weight`` ``[out, in]``, an ``embedding`` one row a token.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fjax._checks import positive
from fjax._trees import list_paths, name_leaves
from fjax.adapters import Adapters, check_belong, has_out_first
from fjax.models.base import Family, family_of
from fjax.models.families import FAMILIES
from fjax.models.huggingface.folders import ADAPTER_CONFIG, read_json
from fjax.models.huggingface.save import written_aside
from fjax.models.huggingface.tensors import named_tensors, param_shapes, read_tensors, write_tensors
from fjax.models.huggingface.tokenizers import some
from fjax.types import Array, Params

__all__ = ["load_adapters", "save_adapters"]

_TENSORS, _PREFIX = "adapter_model.safetensors", "base_model.model."
_SUFFIXES = {
    False: (".lora_A.weight", ".lora_B.weight"),
    True: (".lora_embedding_A", ".lora_embedding_B"),
}
"""Of the names of A and B; True for a module that looks rows up."""

# What an adapter_config.json may say of plain LoRA, or says of its training alone. Whatever else is
# said there and is not empty makes it another function.
_PLAIN = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "bias", "init_lora_weights", "lora_dropout", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
# Beginnings that leave the base model's weights as they are.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class _Module(NamedTuple):
    """A matrix of the model, as PEFT knows it.

    Attributes:
        path: of the leaf.
        name: of the module in transformers' model.
        shape: of the leaf.
        looks_up: whether it is an embedding.
        tied: the module that has the same matrix as its weight; None if there is none.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    looks_up: bool
    tied: str | None


def save_adapters(
    path: str | Path,
    adapters: Mapping[str, Mapping[str, Array]],
    config: Any,
    *,
    alpha: float | None = None,
    base_model: str | Path | None = None,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a folder that `peft` opens: ``PeftModel.from_pretrained(base, path)``.

        W + (α/r) B · A

    An adapter of an embedding that is the head too is one of both there, as it is here; but what
    `peft` merges then has it twice, so take the whole model instead (``model.save``).

    Args:
        path: the folder; made if it is not there.
        adapters: as `fjax.adapters.init_lora` makes them for the parameters of a model.
        config: of that model; its class says which family it is of.
        alpha: as given to `fjax.adapters.merge_lora`.
        base_model: the folder of the model, or its name on the hub, for those who are to find it
            by the adapters: `fjax.from_pretrained` and transformers, given this folder.
        families: to find that of ``config`` in.

    Raises:
        OSError: if it cannot be written.
        ValueError: for an adapter that is of no matrix of such a model, and for a configuration
            that is of none of the families.

    >>> import jax, tempfile
    >>> from fjax.adapters import init_lora
    >>> from fjax.models import gpt2
    >>> config = gpt2.GPT2Config(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> params = gpt2.init_params(config, jax.random.key(0))
    >>> adapters = init_lora(params, jax.random.key(1), rank=2, pattern="attn")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(folder, adapters, config, alpha=4.0, base_model="gpt2")
    ...     found, alpha = load_adapters(folder, params, config)
    >>> sorted(found), alpha
    (['h_0/attn/c_attn/kernel', 'h_0/attn/c_proj/kernel'], 4.0)

    Source: Hu et al. 2021, equation 3; PEFT's LoraConfig.
    """
    if alpha is not None:
        positive(alpha=alpha)
    family = family_of(config, families)
    like = param_shapes(family, config, jnp.float32)
    check_belong(adapters, name_leaves(like))
    modules = _modules(family, config, like)
    adapted = [module for module in modules if module.path in adapters]
    tensors: dict[str, Array] = {}
    for module in adapted:
        tensors |= _as_peft(module, adapters[module.path])
    ranks = {module.name: adapters[module.path]["down"].shape[1] for module in adapted}
    described = _describe(modules, adapted, ranks, alpha)
    described["base_model_name_or_path"] = None if base_model is None else str(base_model)
    with written_aside(Path(path)) as new:
        text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        (new / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        write_tensors(new / _TENSORS, tensors)
        # safetensors makes its file readable by its owner only.
        shutil.copymode(new / ADAPTER_CONFIG, new / _TENSORS)


def load_adapters(
    path: str | Path, params: Params, config: Any, *, families: Sequence[Family] = FAMILIES
) -> tuple[Adapters, float]:
    """Reads a folder that `save_adapters` or `peft` wrote: the adapters, and their α.

        merge_lora(params, adapters, alpha=alpha),    attach_lora(params, adapters, alpha=alpha)

    With rank-stabilised scales, α/√r, and with an α for each module, α is that with which α/r is
    the same, and what is left is in ``up``.

    Args:
        path: the folder, with adapter_config.json and adapter_model.safetensors.
        params: of the base model, or their shapes.
        config: of the base model.
        families: to find that of ``config`` in.

    Returns:
        Path -> ``{"down": [in, r], "up": [r, out]}`` in float32, as `fjax.adapters.init_lora` makes
        them, and α.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: for adapters of another base model, with what differs; for what is not plain
            LoRA, such as DoRA, biases, or whole modules that were trained too; and for tensors that
            are not finite.

    Source: Hu et al. 2021, equation 3; PEFT's LoraConfig.
    """
    folder = Path(path).expanduser()
    family = family_of(config, families)
    said = _read_config(folder)
    modules = _modules(family, config, params)
    found = _pair_up(folder, read_tensors(folder / _TENSORS), said)
    pairs = _belonging(folder, family, modules, found, said)
    adapters, alphas = {}, {}
    for module in modules:
        if module.name in pairs:
            adapters[module.path] = _from_peft(module, *pairs[module.name])
            alphas[module.path] = _alpha(said, module.name, rank=len(pairs[module.name][0]))
    alpha = next(iter(alphas.values()))
    for path, own in alphas.items():
        if own != alpha:
            adapters[path]["up"] = adapters[path]["up"] * (own / alpha)
    return adapters, alpha


def _modules(family: Family, config: Any, params: Params) -> list[_Module]:
    """Every matrix of the model."""
    paths = dict(zip(named_tensors(family, params), name_leaves(params).items(), strict=True))
    copies = {original: copy for copy, original in family.tied(config).items()}
    return [
        _Module(
            path,
            name.removesuffix(".weight"),
            tuple(leaf.shape),
            path.rpartition("/")[2] == "embedding" or name == family.embedding,
            _module(copies.get(name.removeprefix(family.prefix))),
        )
        for name, (path, leaf) in paths.items()
        if len(leaf.shape) == 2
    ]


def _module(tensor: str | None) -> str | None:
    return None if tensor is None else tensor.removesuffix(".weight")


def _as_peft(module: _Module, adapter: Mapping[str, Array]) -> dict[str, Array]:
    """A and B by their names, and those of the head that is the same matrix."""
    down, up = (jnp.asarray(adapter[name]) for name in ("down", "up"))
    # Contiguous, for safetensors writes memory as it lies.
    turned = jnp.array(down.T), jnp.array(up.T)
    pair = (up, down) if _is_linear(module) else turned
    tensors = _named(module.name, pair, looks_up=module.looks_up)
    if module.tied is not None:  # [V, D], as torch's Linear has it
        tensors |= _named(module.tied, (up, down), looks_up=False)
    return tensors


def _named(module: str, pair: Sequence[Array], *, looks_up: bool) -> dict[str, Array]:
    names = (f"{_PREFIX}{module}{suffix}" for suffix in _SUFFIXES[looks_up])
    return dict(zip(names, pair, strict=True))


def _from_peft(module: _Module, a: Array, b: Array) -> dict[str, Array]:
    if _is_linear(module):
        return {"down": b, "up": a}
    return {"down": a.T, "up": b.T}


def _is_linear(module: _Module) -> bool:
    """Whether its matrix is ``[out, in]``, as torch's Linear has it."""
    return has_out_first(module.path) and not module.looks_up


def _describe(
    modules: Sequence[_Module],
    adapted: Sequence[_Module],
    ranks: Mapping[str, int],
    alpha: float | None,
) -> dict[str, Any]:
    """adapter_config.json."""
    rank = next(iter(ranks.values()))
    others = {name: own for name, own in ranks.items() if own != rank}
    tied = [module.tied for module in adapted if module.tied is not None]
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    return kind | {
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "rank_pattern": others,
        "alpha_pattern": others if alpha is None else {},  # α = r of each
        "target_modules": sorted({*_shortest(modules, ranks), *tied}),
        "fan_in_fan_out": any(module.path.endswith("/kernel") for module in adapted),
        "bias": "none",
        "lora_dropout": 0.0,
        **({"ensure_weight_tying": True} if tied else {}),
    }


def _shortest(modules: Sequence[_Module], adapted: Mapping[str, int]) -> list[str]:
    """Ends of names that all that is adapted has, and nothing else."""
    kept = [module.name.split(".") for module in modules if module.name not in adapted]

    def shortest(name):
        parts = name.split(".")
        ends = (parts[-n:] for n in range(1, len(parts) + 1))
        return ".".join(next(end for end in ends if not any(k[-len(end) :] == end for k in kept)))

    return [shortest(name) for name in adapted]


def _read_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, if it is of plain LoRA."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}, so it holds no adapters.")
    said = read_json(folder / ADAPTER_CONFIG)
    expected = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _BEGINNINGS}
    odd = [name for name, allowed in expected.items() if said.get(name) not in allowed]
    odd += sorted(name for name in said.keys() - _PLAIN if said[name])
    if odd:
        listed = ", ".join(f"{name}={said.get(name)!r:.60}" for name in odd)
        raise ValueError(
            f"The adapters in {folder} are not plain LoRA, which is all that fjax adds to weights: "
            f"{listed}. Merge them with peft's merge_and_unload, and save the whole model."
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(said.get(name), (int, float)) or not said[name] > 0:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} must have a positive number for {name}, and has "
                f"{said.get(name)!r:.60}."
            )
    return said


def _pair_up(
    folder: Path, tensors: Mapping[str, Array], said: Mapping[str, Any]
) -> dict[str, tuple[Array, Array]]:
    """Module -> A and B."""
    left = {name: x for name, x in tensors.items() if not name.endswith(".base_layer.weight")}
    found = {}
    for of_a, of_b in _SUFFIXES.values():
        for name in [name for name in left if name.endswith(of_a)]:
            module = name.removesuffix(of_a)
            if module + of_b in left:
                found[module.removeprefix(_PREFIX)] = left.pop(name), left.pop(module + of_b)
    if left or not found:
        raise ValueError(
            f"{folder / _TENSORS} must have A and B of each module that is adapted, and nothing "
            f"else; it has {some(sorted(left)) if left else 'no tensor'}."
        )
    bad = [name for name, pair in found.items() if not all(jnp.isfinite(x).all() for x in pair)]
    if bad:
        raise ValueError(f"Adapters in {folder} have values that are not finite: {some(bad)}.")
    return found


def _belonging(
    folder: Path,
    family: Family,
    modules: Sequence[_Module],
    found: Mapping[str, tuple[Array, Array]],
    said: Mapping[str, Any],
) -> dict[str, tuple[Array, Array]]:
    """A and B by the names of this model's modules, whose shapes they have.

    Those of a head that is the embedding again are left out, once they are seen to be the same.
    """
    known = {module.name.removeprefix(family.prefix): module for module in modules}
    heads = {module.tied: module for module in modules if module.tied is not None}
    short = {name.removeprefix(family.prefix): pair for name, pair in found.items()}
    of_heads = {heads[name].name: short.pop(name) for name in heads if name in short}
    base = said.get("base_model_name_or_path")
    other = f"{folder} holds adapters of another base model" + f" ({base!r:.80})" * bool(base)
    if unknown := sorted(short.keys() - known.keys()):
        raise ValueError(
            f"{other}: this {family.name} has no {some(unknown)} to adapt. There are "
            f"{list_paths(known)}."
        )
    if wrong := [text for name, pair in short.items() if (text := _misfit(known[name], *pair))]:
        raise ValueError(f"{other}, of other shapes than this {family.name}: {some(wrong)}.")
    pairs = {known[name].name: pair for name, pair in short.items()}
    for head, module in heads.items():
        _check_head(folder, head, module, pairs.get(module.name), of_heads.get(module.name))
    return pairs


def _misfit(module: _Module, a: Array, b: Array) -> str:
    """What is wrong with the shapes of A and B; "" if nothing is."""
    rows, columns = module.shape
    out, into = (rows, columns) if _is_linear(module) else (columns, rows)
    if a.ndim == b.ndim == 2 and len(a) and (a.shape[1], b.shape) == (into, (out, len(a))):
        return ""
    return (
        f"{module.name} has A {list(a.shape)} and B {list(b.shape)}, not [r, {into}] and [{out}, r]"
    )


def _check_head(
    folder: Path,
    head: str | None,
    module: _Module,
    ours: tuple[Array, Array] | None,
    theirs: tuple[Array, Array] | None,
) -> None:
    """Whether embedding and head, where they are one matrix, have one change, or none."""
    turned = None if ours is None else (ours[1].T, ours[0].T)
    if turned is None or theirs is None:
        same = turned is theirs
    else:
        same = all(map(np.array_equal, turned, theirs))
    if not same:
        raise ValueError(
            f"The adapters in {folder} change {module.name} and {head} differently, which are one "
            f"matrix in this model. Adapt both with ensure_weight_tying, or leave both out."
        )


def _alpha(said: Mapping[str, Any], module: str, *, rank: int) -> float:
    """The α with which α/r is the scale of a module's change."""
    patterns = said.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = float(next(own, said["lora_alpha"]))
    return alpha * math.sqrt(rank) if said.get("use_rslora") else alpha
