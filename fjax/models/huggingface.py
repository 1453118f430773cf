"""Hugging Face folders in and out: configuration and tokenizer through transformers, weights by
name, never torch.

This is the only file that knows transformers and safetensors, and it imports them on use, since
transformers alone takes seconds. Parameters carry the checkpoint's names and layout
(`fjax.models.gpt2`), so a tensor is found by spelling its path with dots:
``h_3/attn/c_attn/kernel`` is ``h.3.attn.c_attn.weight``.
"""

import copy
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fjax.models import gpt2
from fjax.types import Array, DecodeFn, LogitsFn, Params, ScoreFn

# What is read first, since it says whether the rest is worth a download; and all that has a part in
# model and tokenizer.
_KIND = ["config.json", "adapter_config.json"]
_FILES = [
    *_KIND,
    "generation_config.json",
    "model*.safetensors*",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
]
# Options of transformers' GPT-2 that change the function, none of them used by a published
# checkpoint of OpenAI's.
_UNSUPPORTED = {
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "quantization_config": None,
}
_FLOATS = {"F16", "BF16", "F32", "F64"}

TEXT_FORMATS = ("text", "end text", "text end", "end text end")
"""What a reward model may have been trained on: texts alone, or with the end-of-sequence token
before, behind, or both."""


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
        text_format: where the end-of-sequence token stands in what it scores, one of
            `TEXT_FORMATS`; another format gives other scores. None if its folder does not say.
    """

    config: gpt2.GPT2Config
    params: Params
    tokenizer: Any
    score_fn: ScoreFn
    text_format: str | None = None


def from_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> PretrainedModel:
    """Loads a GPT-2 from a local folder or by its name on the Hugging Face hub.

    Weights are read from ``model.safetensors``, or from the shards that
    ``model.safetensors.index.json`` lists, with or without the prefix ``transformer.``, in whatever
    precision they are stored.

    Args:
        name_or_path: a folder, or a name such as ``gpt2``, ``gpt2-xl``, ``distilgpt2``.
        dtype: of the computation: bfloat16 on accelerators. Softmax and logits are float32 all the
            same.
        param_dtype: of the parameters. Keep float32 for training.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there, or the hub does not have or
            give it.
        ValueError: if it is not a GPT-2, is a variant that computes something else, lacks tensors
            or has others (named), or tensors that are no finite floats, or if its tokenizer has ids
            that it has not.
    """
    folder, config = _open(name_or_path)
    tokenizer = _load_tokenizer(folder, config)
    params, _ = _load_params(folder, config, param_dtype)
    return PretrainedModel(
        config,
        params,
        tokenizer,
        gpt2.logits_fn(config, dtype=dtype),
        gpt2.decode_fn(config, dtype=dtype),
        partial(gpt2.init_cache, config, dtype=dtype),
    )


def load_reward_model(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> RewardModel:
    """Loads a GPT-2 with a scalar head, as `save_reward_model` or GPT2ForSequenceClassification
    with one label wrote it.

    Args:
        name_or_path: a folder, or a name on the hub.
        dtype: of the computation.
        param_dtype: of the parameters.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there.
        ValueError: if it is not a GPT-2, has no scalar head, or anything else that
            `from_pretrained` refuses.
    """
    folder, config = _open(name_or_path)
    text_format = _read_json(folder / "config.json").get("text_format")
    if text_format not in (None, *TEXT_FORMATS):
        raise ValueError(
            f"{folder} has text_format={text_format!r} in its config.json; fjax knows "
            f"{', '.join(TEXT_FORMATS)}."
        )
    tokenizer = _load_tokenizer(folder, config)
    params, score = _load_params(folder, config, param_dtype, head=True)
    params = {"transformer": params, "score": {"kernel": score}}
    return RewardModel(config, params, tokenizer, gpt2.score_fn(config, dtype=dtype), text_format)


def save_reward_model(
    path: str | Path,
    params: Params,
    config: gpt2.GPT2Config,
    tokenizer: Any,
    *,
    dtype: DTypeLike | None = None,
    text_format: str | None = None,
) -> None:
    """Writes a folder that transformers opens as GPT2ForSequenceClassification with one label.

    transformers scores the last token that is not padding. A tokenizer without a padding token, or
    with the end-of-sequence token as such, which would hide the end of a text, is therefore written
    with a padding token of its own, and the embedding with a row of zeros for it: batches then have
    the scores of single texts.

    Args:
        path: the folder; made if it is not there.
        params: see `RewardModel`.
        config: of the same model.
        tokenizer: of transformers.
        dtype: to store floats in; None keeps each as it is.
        text_format: see `RewardModel`; kept in config.json.

    Raises:
        OSError: if it cannot be written; an earlier model in the folder is then untouched.
        ValueError: if the text format is none of `TEXT_FORMATS`.
    """
    if text_format not in (None, *TEXT_FORMATS):
        raise ValueError(
            f"text_format must be one of {', '.join(TEXT_FORMATS)}, got {text_format!r}."
        )
    tensors = {f"transformer.{name}": leaf for name, leaf in _named(params["transformer"]).items()}
    # Contiguous, for safetensors writes memory as it lies.
    tensors["score.weight"] = jnp.array(params["score"]["kernel"].T)
    tokenizer = _with_padding(tokenizer)
    more = max(tokenizer.pad_token_id + 1 - config.vocab_size, 0)
    tensors["transformer.wte.weight"] = jnp.pad(
        tensors["transformer.wte.weight"], ((0, more), (0, 0))
    )
    config = dataclasses.replace(config, vocab_size=config.vocab_size + more)
    described = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    described |= {} if text_format is None else {"text_format": text_format}
    _write(
        Path(path),
        tensors,
        config,
        tokenizer,
        dtype,
        architecture="GPT2ForSequenceClassification",
        **described,
    )


def _with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it with a padding token that no text can end in."""
    if tokenizer.pad_token_id not in (
        None,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    ):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def save_pretrained(
    path: str | Path,
    params: Params,
    config: gpt2.GPT2Config,
    tokenizer: Any,
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a folder that transformers opens: ``AutoModelForCausalLM.from_pretrained(path)``.

    All files are written beside the folder first and moved in one by one when they are whole; other
    files in it stay.

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


def _write(path, tensors, config, tokenizer, dtype, *, architecture, **more):
    import safetensors.flax

    path.parent.mkdir(parents=True, exist_ok=True)
    if dtype is not None:
        tensors = {name: leaf.astype(dtype) for name, leaf in tensors.items()}
    stored = str(next(iter(tensors.values())).dtype)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = dataclasses.asdict(config) | ids | more
    described = _transformers().GPT2Config(**fields, architectures=[architecture], dtype=stored)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        described.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        safetensors.flax.save_file(
            tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"}
        )
        # safetensors makes its file readable by its owner only.
        shutil.copymode(Path(temporary) / "config.json", Path(temporary) / "model.safetensors")
        path.mkdir(exist_ok=True)
        for new in sorted(Path(temporary).iterdir()):
            # of chat templates: those of an earlier tokenizer are not this one's
            if (path / new.name).is_dir():
                shutil.rmtree(path / new.name)
            os.replace(new, path / new.name)


def _transformers() -> Any:
    """The package, without what it says on import where there is no torch, which nothing here
    needs.
    """
    if "transformers" in sys.modules:
        return import_module("transformers")
    before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        return import_module("transformers")
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        else:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def _open(name_or_path: str | Path) -> tuple[Path, gpt2.GPT2Config]:
    """The folder and what its config.json says; of a name on the hub, that file is had and looked
    at before the others.
    """
    local = _local(name_or_path)
    folder = _download(str(name_or_path), _KIND) if local is None else local
    config = _config_from(_read_json(folder / "config.json"), folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter (adapter_config.json), which fjax does not add to the "
            f"weights. Merge it with peft's "
            "merge_and_unload, and save the whole model."
        )
    # By the commit, so that all files are of one.
    return (
        (folder, config)
        if local
        else (_download(str(name_or_path), _FILES, revision=folder.name), config)
    )


def _local(name_or_path: str | Path) -> Path | None:
    """A folder that is there; None for what must be a name on the hub."""
    name, folder = str(name_or_path), Path(name_or_path).expanduser()
    if name and folder.is_dir():  # the path of no name is the current folder
        return folder
    # Names on the hub are `model` or `owner/model`; all else is meant as a path.
    if (
        isinstance(name_or_path, Path)
        or name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or not name
    ):
        raise FileNotFoundError(
            f"There is no folder {name or repr(name)}; give the folder of a GPT-2, or a name on "
            f"the hub."
        )
    return None


def _download(name: str, files: list[str], *, revision: str | None = None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=files, revision=revision)
        )
    # the hub's client has a dozen of its own kinds, all of which mean the same here
    except Exception as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder nor a model that the Hugging Face hub gave "
            f"({type(error).__name__}). Check the "
            "spelling and the connection, or download it where there is one and give its folder."
        ) from error


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}, so it is not the folder of a model."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is a JSON {type(found).__name__}, not an object.")
    return found


def _config_from(raw: dict, folder: Path) -> gpt2.GPT2Config:
    if raw.get("model_type") != "gpt2":
        raise ValueError(
            f"{folder} holds a model of type {raw.get('model_type')!r}; fjax reads 'gpt2' only."
        )
    for name, supported in _UNSUPPORTED.items():
        if raw.get(name, supported) != supported:
            raise ValueError(
                f"{folder} is a GPT-2 with {name}={raw[name]!r:.80}, which fjax does not compute."
            )
    names = {field.name: field.name for field in dataclasses.fields(gpt2.GPT2Config)}
    names |= _transformers().GPT2Config.attribute_map  # hidden_size is n_embd, and so on
    chosen = {}
    for name, value in raw.items():
        field = names.get(name)
        if field in chosen and chosen[field] != value:
            raise ValueError(
                f"The config.json in {folder} says two things of {field}: {chosen[field]!r} and "
                f"{name}={value!r}."
            )
        if field is not None:
            chosen[field] = value
    try:
        return gpt2.GPT2Config(**chosen)
    except ValueError as error:
        raise ValueError(f"The config.json in {folder} is of no GPT-2: {error}") from error


def _load_tokenizer(folder: Path, config: gpt2.GPT2Config) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json with merges.txt)."
        )
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
    # whatever its files may have in them, each reader of theirs has errors of its own
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The tokenizer in {folder} cannot be read, {type(error).__name__}: {reason:.200}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer in {folder} has no end-of-sequence token, so no sequence could ever "
            f"end."
        )
    # Other special tokens may lie beyond the embedding, such as padding: no text has them.
    special = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    } - {tokenizer.eos_token_id}
    beyond = {
        index: token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size
    }
    beyond = [f"{beyond[index]!r} is {index}" for index in sorted(beyond.keys() - special)]
    if beyond:
        raise ValueError(
            f"The tokenizer in {folder} has ids beyond the vocab_size={config.vocab_size} of the "
            f"model: {_some(beyond)}."
        )
    return tokenizer


class _Stored(NamedTuple):
    """A tensor in a file, unread: the name and the dtype as safetensors has them."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _load_params(
    folder: Path, config: gpt2.GPT2Config, dtype: DTypeLike, *, head: bool = False
) -> tuple[Params, Array | None]:
    """The parameters and, if asked for, the kernel of a scalar head."""
    stored = _list_tensors(folder)
    if config.n_layer > len(stored):  # before so many blocks are traced
        raise ValueError(
            f"The weights in {folder} are {len(stored)} tensors, too few for "
            f"n_layer={config.n_layer} blocks."
        )
    like = jax.eval_shape(lambda: gpt2.init_params(config, jax.random.key(0)))
    expected: dict[str, tuple[int, ...]] = {name: leaf.shape for name, leaf in _named(like).items()}
    if head:
        expected["score.weight"] = (1, config.n_embd)
        _check_head(folder, stored, expected["score.weight"])
    _check_tensors(folder, config, expected, stored)
    found = {name: _read(stored[name], dtype) for name in expected}
    bad = [name for name, leaf in found.items() if not bool(jnp.isfinite(leaf).all())]
    if bad:
        raise ValueError(
            f"Tensors in {folder} have values that are not finite in {jnp.dtype(dtype)}: "
            f"{_some(bad)}."
        )
    score = found.pop("score.weight").T if head else None
    if not head:
        _check_tied(folder, stored)
    return jax.tree.unflatten(jax.tree.structure(like), list(found.values())), score


def _check_head(folder: Path, stored: Mapping[str, _Stored], shape: tuple[int, ...]) -> None:
    score = stored.get("score.weight")
    if score is None or score.shape != shape:
        found = "none" if score is None else f"one of shape {score.shape}"
        raise ValueError(
            f"{folder} is no reward model: it needs a score.weight of shape {shape}, and has "
            f"{found}."
        )


def _check_tensors(
    folder: Path,
    config: gpt2.GPT2Config,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, _Stored],
) -> None:
    """Whether the weights are those of the configuration, no more and no less, and numbers that can
    be computed with.
    """
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise ValueError(
            f"The weights in {folder} lack {len(missing)} tensors of this GPT-2: {_some(missing)}."
        )
    # The causal mask, which the first checkpoints have among their weights, and the head, which is
    # the embedding again.
    buffers = {
        f"h.{i}.attn.{name}" for i in range(config.n_layer) for name in ("bias", "masked_bias")
    }
    more = sorted(stored.keys() - expected.keys() - buffers - {"lm_head.weight"})
    if more:
        raise ValueError(
            f"The weights in {folder} have {len(more)} tensors that this GPT-2 has not: "
            f"{_some(more)}."
        )
    wrong = [
        f"{n} is {stored[n].shape}, not {shape}"
        for n, shape in expected.items()
        if stored[n].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"Tensors in {folder} do not have the shapes of its config.json: {_some(wrong)}."
        )
    coded = [
        f"{name} is {stored[name].dtype}" for name in expected if stored[name].dtype not in _FLOATS
    ]
    if coded:
        raise ValueError(
            f"Tensors in {folder} are not of {', '.join(sorted(_FLOATS))}, quantised perhaps: "
            f"{_some(coded)}."
        )


def _check_tied(folder: Path, stored: Mapping[str, _Stored]) -> None:
    """Whether the logits are of the embedding."""
    head = stored.get("lm_head.weight")
    if head is None:
        if _read_json(folder / "config.json").get("tie_word_embeddings", True):
            return
        raise ValueError(
            f"{folder} has tie_word_embeddings=False and no lm_head.weight, so that its logits are "
            f"not known."
        )
    if not bool(
        jnp.array_equal(_read(head, jnp.float32), _read(stored["wte.weight"], jnp.float32))
    ):
        raise ValueError(
            f"{folder} has an lm_head that differs from wte; fjax computes GPT-2 with tied "
            f"embeddings only."
        )


def _list_tensors(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder by its name without the prefix; the weights themselves are not
    read.
    """
    tensors: dict[str, _Stored] = {}
    for file, listed in _shards(folder).items():
        found = _headers(folder / file)
        differing = sorted(listed ^ {tensor.name for tensor in found}) if listed else []
        if differing:
            raise ValueError(
                f"{folder / file} does not have the tensors that the index says, as to "
                f"{_some(differing)}."
            )
        for tensor in found:
            name = tensor.name.removeprefix("transformer.")
            if tensors.setdefault(name, tensor) is not tensor:
                raise ValueError(
                    f"The weights in {folder} have {name} twice, as {tensors[name].name} and as "
                    f"{tensor.name}."
                )
    return tensors


def _shards(folder: Path) -> dict[str, set[str]]:
    """The files of the weights, and the tensors that the index says are in each; none where there
    is no index.
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
    listed = _read_json(index).get("weight_map")
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


def _read(tensor: _Stored, dtype: DTypeLike) -> Array:
    import safetensors

    with safetensors.safe_open(tensor.file, framework="flax") as file:
        return file.get_tensor(tensor.name).astype(dtype)


def _named(params: Params) -> dict[str, Any]:
    """Leaves by their names in a checkpoint, in the order of the tree."""
    return {
        _hf_name([key.key for key in path]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _hf_name(path: list[str]) -> str:
    parts = [f"h.{part[2:]}" if part.startswith("h_") else part for part in path]
    return ".".join([*parts[:-1], parts[-1] if parts[-1] == "bias" else "weight"])


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
