"""A language model or a reward model as a folder that transformers opens."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fjax.adapters import is_adapted, merge_attached
from fjax.models.base import TEXT_FORMATS, Family, family_of
from fjax.models.families import FAMILIES
from fjax.models.huggingface.folders import read_json
from fjax.models.huggingface.tensors import named_tensors, write_tensors
from fjax.models.huggingface.tokenizers import import_transformers, with_padding
from fjax.types import Array, Params

__all__ = ["save_pretrained", "save_reward_model"]

FROM_PI = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""Of generation_config.json: π itself, which is what was trained and measured. Where nothing is
said, transformers takes the likeliest token, or draws from the fifty likeliest."""


def save_pretrained(
    path: str | Path,
    params: Params,
    config: Any,
    tokenizer: Any,
    *,
    dtype: DTypeLike | None = None,
    eos_ids: Sequence[int] | None = None,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a folder that transformers opens: ``AutoModelForCausalLM.from_pretrained(path)``.

    All files are written beside the folder first and moved in one by one when they are whole; other
    files in it stay. A `LanguageModel` that was loaded has this as ``model.save(path, params)``.

    Args:
        path: the folder; made if it is not there.
        params: of the model; adapters that `fjax.adapters.attach_lora` has put beside them are
            added up, one matrix after the other.
        config: of the same model; its class says which family it is of.
        tokenizer: of transformers.
        dtype: to store floats in; None keeps each as it is.
        eos_ids: the tokens that end a sequence, if it is not the tokenizer's alone.
        families: to find that of ``config`` in.

    Raises:
        OSError: if it cannot be written; an earlier model in the folder is then untouched.
        ValueError: if the configuration is of none of the families.

    A tiny model with two words, written and read:

    >>> import jax, tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> from fjax.models import from_pretrained, gpt2
    >>> words = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "<end>": 2}, unk_token="<end>"))
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    >>> config = gpt2.GPT2Config(vocab_size=3, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    >>> params = gpt2.init_params(config, jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, params, config, tokenizer)
    ...     model = from_pretrained(folder)
    >>> model.config == config, model.max_length, model.eos_ids
    (True, 8, (2,))
    """
    family = family_of(config, families)
    ids = _special_ids(tokenizer, eos_ids)
    pad = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    _write(
        Path(path),
        named_tensors(family, jax.tree.map(_whole, params, is_leaf=is_adapted)),
        family.write_config(config) | ids,
        tokenizer,
        dtype,
        generation=ids | pad | FROM_PI,
    )


def save_reward_model(
    path: str | Path,
    params: Params,
    config: Any,
    tokenizer: Any,
    *,
    dtype: DTypeLike | None = None,
    text_format: str | None = None,
    families: Sequence[Family] = FAMILIES,
) -> None:
    """Writes a folder for transformers' class for sequence classification with one label.

    transformers scores the last token that is not padding. A tokenizer without a padding token, or
    with the end-of-sequence token as such, which would hide the end of a text, is therefore written
    with a padding token of its own, and the embedding with a row of zeros for it: batches then have
    the scores of single texts.

    Args:
        path: the folder; made if it is not there.
        params: see `RewardModel`.
        config: of the same model; its class says which family it is of.
        tokenizer: of transformers.
        dtype: to store floats in; None keeps each as it is.
        text_format: see `RewardModel`; kept in config.json.
        families: to find that of ``config`` in.

    Raises:
        OSError: if it cannot be written; an earlier model in the folder is then untouched.
        ValueError: if the text format is none of `TEXT_FORMATS`, or the configuration of no family
            that has reward models.
    """
    if text_format not in (None, *TEXT_FORMATS):
        raise ValueError(
            f"text_format must be one of {', '.join(TEXT_FORMATS)}, got {text_format!r}."
        )
    family = family_of(config, families)
    if family.embedding is None or family.score_architecture is None:
        raise ValueError(f"{family.name} is a family without reward models.")
    body = {name: tree for name, tree in params["transformer"].items() if name != family.head}
    tensors = named_tensors(family, body)
    # Contiguous, for safetensors writes memory as it lies.
    tensors["score.weight"] = jnp.array(params["score"]["kernel"].T)
    tokenizer = with_padding(tokenizer)
    more = max(tokenizer.pad_token_id + 1 - config.vocab_size, 0)
    tensors[family.embedding] = jnp.pad(tensors[family.embedding], ((0, more), (0, 0)))
    config = dataclasses.replace(config, vocab_size=config.vocab_size + more)
    described = family.write_config(config) | _special_ids(tokenizer, None)
    described |= {"architectures": [family.score_architecture], "num_labels": 1}
    described |= {"pad_token_id": tokenizer.pad_token_id}
    described |= {} if text_format is None else {"text_format": text_format}
    _write(Path(path), tensors, described, tokenizer, dtype)


def _whole(leaf: Any) -> Any:
    """On the host where there is a sum to be taken, so that no device has to hold them all."""
    return np.asarray(merge_attached(leaf)) if is_adapted(leaf) else leaf


def _special_ids(tokenizer: Any, eos_ids: Sequence[int] | None) -> dict[str, Any]:
    ends = [tokenizer.eos_token_id] if eos_ids is None else list(eos_ids)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }


def _write(
    path: Path,
    tensors: Mapping[str, Array],
    described: Mapping[str, Any],
    tokenizer: Any,
    dtype: DTypeLike | None,
    *,
    generation: Mapping[str, Any] | None = None,
) -> None:
    if dtype is not None:
        tensors = {name: leaf.astype(dtype) for name, leaf in tensors.items()}
    stored = str(next(iter(tensors.values())).dtype)
    with written_aside(path) as new:
        _write_config(new, dict(described) | {"dtype": stored})
        if generation:
            _write_json(new / "generation_config.json", generation)
        tokenizer.save_pretrained(new)
        write_tensors(new / "model.safetensors", tensors)
        # safetensors makes its file readable by its owner only.
        shutil.copymode(new / "config.json", new / "model.safetensors")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A folder to write to, beside this one, into which all is moved once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        yield Path(temporary)
        path.mkdir(exist_ok=True)
        _move_all(Path(temporary), path)


def _write_config(folder: Path, fields: dict[str, Any]) -> None:
    """config.json, with what transformers adds to it for a model that it knows."""
    known = import_transformers()
    if fields["model_type"] in known.CONFIG_MAPPING:
        others = {name: value for name, value in fields.items() if name != "model_type"}
        known.AutoConfig.for_model(fields["model_type"], **others).save_pretrained(folder)
        # What this version writes in other words stays for the earlier ones, which read no others.
        written = read_json(folder / "config.json")
        if not fields.keys() <= written.keys():
            _write_json(folder / "config.json", {**fields, **written})
    else:
        _write_json(folder / "config.json", fields)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_all(source: Path, path: Path) -> None:
    for new in sorted(source.iterdir()):
        # of chat templates: those of an earlier tokenizer are not this one's
        if (path / new.name).is_dir():
            shutil.rmtree(path / new.name)
        os.replace(new, path / new.name)
