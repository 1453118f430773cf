"""Hugging Face folders in and out: configuration and tokenizer through transformers, weights by name, never torch.

This is the only file that knows transformers and safetensors, and it imports them on use, since transformers alone takes
seconds. Parameters carry the checkpoint's names and layout (`fjax.models.gpt2`), so a tensor is found by spelling its path
with dots: ``h_3/attn/c_attn/kernel`` is ``h.3.attn.c_attn.weight``.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax._typing import Array, DecodeFn, LogitsFn, Params, ScoreFn
from fjax.models import gpt2

_FILES = ["config.json", "model*.safetensors*", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"]
# Options of transformers' GPT-2 that change the function, none of them used by a published checkpoint of OpenAI's.
_UNSUPPORTED = {
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "scale_attn_weights": True,
}


class PretrainedModel(NamedTuple):
    """A model, ready to be sampled from and aligned.

    Attributes:
        config: its shape.
        params: its parameters.
        tokenizer: of transformers.
        logits_fn: teacher-forced, see `fjax.make_log_prob_fn`.
        decode_fn: cached, see `fjax.sample`.
        init_cache: (rows, columns) -> empty cache for ``decode_fn``.
    """

    config: gpt2.GPT2Config
    params: Params
    tokenizer: Any
    logits_fn: LogitsFn
    decode_fn: DecodeFn
    init_cache: Callable[[int, int], gpt2.KVCache]

    @property
    def eos_id(self) -> int:
        """The token that ends a sequence; GPT-2 has it before a text as well, and for padding."""
        return self.tokenizer.eos_token_id


class RewardModel(NamedTuple):
    """A GPT-2 that gives a text a number.

    Attributes:
        config: its shape.
        params: ``{"transformer": as of `fjax.models.gpt2`, "score": {"kernel": [D, 1]}}``.
        tokenizer: of transformers.
        score_fn: (params, tokens, where) -> scores.
    """

    config: gpt2.GPT2Config
    params: Params
    tokenizer: Any
    score_fn: ScoreFn


def from_pretrained(
    name_or_path: str | Path, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> PretrainedModel:
    """Loads a GPT-2 from a local folder or by its name on the Hugging Face hub.

    Weights are read from ``model.safetensors``, or from the shards that ``model.safetensors.index.json`` lists, with or
    without the prefix ``transformer.``, in whatever precision they are stored.

    Args:
        name_or_path: a folder, or a name such as ``gpt2``, ``gpt2-xl``, ``distilgpt2``.
        dtype: of the computation: bfloat16 on accelerators. Softmax and logits are float32 all the same.
        param_dtype: of the parameters. Keep float32 for training.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there, or the hub does not have or give it.
        ValueError: if it is not a GPT-2, is a variant that computes something else, or lacks tensors (named).
    """
    folder = _resolve(name_or_path)
    raw = _read_json(folder / "config.json")
    config = _config_from(raw, folder)
    tokenizer = _load_tokenizer(folder)
    params = _load_params(folder, config, param_dtype)
    return PretrainedModel(
        config,
        params,
        tokenizer,
        gpt2.logits_fn(config, dtype=dtype),
        gpt2.decode_fn(config, dtype=dtype),
        partial(gpt2.init_cache, config, dtype=dtype),
    )


def load_reward_model(
    name_or_path: str | Path, *, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
) -> RewardModel:
    """Loads a GPT-2 with a scalar head, as `save_reward_model` or GPT2ForSequenceClassification with one label wrote it.

    Args:
        name_or_path: a folder, or a name on the hub.
        dtype: of the computation.
        param_dtype: of the parameters.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there.
        ValueError: if it is not a GPT-2, or has no scalar head.
    """
    folder = _resolve(name_or_path)
    config = _config_from(_read_json(folder / "config.json"), folder)
    score = _read_tensors(folder).get("score.weight")
    if score is None or score.shape != (1, config.n_embd):
        found = "none" if score is None else f"one of shape {score.shape}"
        raise ValueError(
            f"{folder} is no reward model: it needs a score.weight of shape (1, {config.n_embd}), and has {found}."
        )
    params = {
        "transformer": _load_params(folder, config, param_dtype),
        "score": {"kernel": score.T.astype(param_dtype)},
    }
    return RewardModel(config, params, _load_tokenizer(folder), gpt2.score_fn(config, dtype=dtype))


def save_reward_model(
    path: str | Path, params: Params, config: gpt2.GPT2Config, tokenizer: Any, *, dtype: DTypeLike | None = None
) -> None:
    """Writes a folder that transformers opens as GPT2ForSequenceClassification with one label.

    Args:
        path: the folder; made if it is not there.
        params: see `RewardModel`.
        config: of the same model.
        tokenizer: of transformers.
        dtype: to store floats in; None keeps each as it is.

    Raises:
        OSError: if it cannot be written; an earlier model in the folder is then untouched.
    """
    tensors = {f"transformer.{name}": leaf for name, leaf in _named(params["transformer"]).items()}
    # Contiguous, for safetensors writes memory as it lies.
    tensors["score.weight"] = jnp.array(params["score"]["kernel"].T)
    _write(Path(path), tensors, config, tokenizer, dtype, architecture="GPT2ForSequenceClassification", num_labels=1)


def save_pretrained(
    path: str | Path, params: Params, config: gpt2.GPT2Config, tokenizer: Any, *, dtype: DTypeLike | None = None
) -> None:
    """Writes a folder that transformers opens: ``AutoModelForCausalLM.from_pretrained(path)``.

    All files are written beside the folder first and moved in one by one when they are whole; other files in it stay.

    Args:
        path: the folder; made if it is not there.
        params: from `fjax.models.gpt2`.
        config: of the same model.
        tokenizer: of transformers.
        dtype: to store floats in; None keeps each as it is.

    Raises:
        OSError: if it cannot be written; an earlier model in the folder is then untouched.
    """
    tensors = {f"transformer.{name}": leaf for name, leaf in _named(params).items()}
    _write(Path(path), tensors, config, tokenizer, dtype, architecture="GPT2LMHeadModel")


def _write(path, tensors, config, tokenizer, dtype, *, architecture, num_labels=2):
    import safetensors.flax
    import transformers

    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype is not None:
        tensors = {name: leaf.astype(dtype) for name, leaf in tensors.items()}
    stored = str(next(iter(tensors.values())).dtype)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "num_labels": num_labels}
    described = transformers.GPT2Config(**dataclasses.asdict(config), **ids, architectures=[architecture], dtype=stored)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        described.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        safetensors.flax.save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes its file readable by its owner only.
        shutil.copymode(Path(temporary) / "config.json", Path(temporary) / "model.safetensors")
        path.mkdir(exist_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, path / file.name)


def _resolve(name_or_path: str | Path) -> Path:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    # Names on the hub are `model` or `owner/model`; all else is meant as a path.
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name}; give the folder of a GPT-2, or a name on the hub.")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # the hub's client has a dozen of its own kinds, all of which mean the same here
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model that the Hugging Face hub gave ({type(error).__name__}). Check the "
            "spelling and the connection, or download it where there is one and give its folder."
        ) from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, so it is not the folder of a model.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _config_from(raw: dict, folder: Path) -> gpt2.GPT2Config:
    if raw.get("model_type") != "gpt2":
        raise ValueError(f"{folder} holds a model of type {raw.get('model_type')!r}; fjax reads 'gpt2' only.")
    for name, supported in _UNSUPPORTED.items():
        if raw.get(name, supported) != supported:
            raise ValueError(f"{folder} is a GPT-2 with {name}={raw[name]}, which fjax does not compute.")
    fields = {field.name for field in dataclasses.fields(gpt2.GPT2Config)}
    return gpt2.GPT2Config(**{name: value for name, value in raw.items() if name in fields})


def _load_tokenizer(folder: Path) -> Any:
    import transformers

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json with merges.txt).")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer in {folder} has no end-of-sequence token, so no sequence could ever end.")
    return tokenizer


def _load_params(folder: Path, config: gpt2.GPT2Config, dtype: DTypeLike) -> Params:
    like = jax.eval_shape(lambda: gpt2.init_params(config, jax.random.key(0)))
    expected, found = _named(like), _read_tensors(folder)
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ValueError(f"The weights in {folder} lack {len(missing)} tensors of this GPT-2: {_some(missing)}.")
    wrong = [f"{n} is {found[n].shape}, not {leaf.shape}" for n, leaf in expected.items() if found[n].shape != leaf.shape]
    if wrong:
        raise ValueError(f"Tensors in {folder} do not have the shapes of its config.json: {_some(wrong)}.")
    head = found.get("lm_head.weight")
    if head is not None and not bool(jnp.array_equal(head, found["wte.weight"])):
        raise ValueError(f"{folder} has an lm_head that differs from wte; fjax computes GPT-2 with tied embeddings only.")
    leaves = [found[name].astype(dtype) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_tensors(folder: Path) -> dict[str, Array]:
    import safetensors.flax

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        raise FileNotFoundError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json. If it has pytorch_model.bin, open it "
            "with transformers once and call save_pretrained, which writes safetensors."
        )
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {file} that its index lists.")
        try:
            tensors |= safetensors.flax.load_file(folder / file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / file} is not a whole safetensors file: {error}.") from error
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _named(params: Params) -> dict[str, Any]:
    """Leaves by their names in a checkpoint, in the order of the tree."""
    return {_hf_name([key.key for key in path]): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _hf_name(path: list[str]) -> str:
    parts = [f"h.{part[2:]}" if part.startswith("h_") else part for part in path]
    return ".".join([*parts[:-1], parts[-1] if parts[-1] == "bias" else "weight"])


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
