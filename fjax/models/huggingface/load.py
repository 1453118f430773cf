"""A language model or a reward model from a folder, or from the hub by its name."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from fjax.adapters import merge_lora
from fjax.models.base import TEXT_FORMATS, Family, LanguageModel, ModelConfig, RewardModel
from fjax.models.families import FAMILIES
from fjax.models.huggingface.adapters import load_adapters
from fjax.models.huggingface.folders import open_folder, read_json
from fjax.models.huggingface.save import save_pretrained
from fjax.models.huggingface.tensors import load_params, param_shapes
from fjax.models.huggingface.tokenizers import end_ids, load_tokenizer
from fjax.models.sharded import check_heads, on_mesh
from fjax.types import Params

__all__ = ["from_pretrained", "load_reward_model"]


def from_pretrained(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    families: Sequence[Family] = FAMILIES,
    mesh: Mesh | None = None,
    remat: bool = False,
    shapes_only: bool = False,
) -> LanguageModel:
    """Loads a language model from a local folder or by its name on the Hugging Face hub.

    It is of the family that knows its ``model_type``: GPT-2, or Llama and its relatives; see
    `fjax.models.FAMILIES`. Weights are read from ``model.safetensors``, or from the shards that
    ``model.safetensors.index.json`` lists, with or without the prefix of a model with a head
    (``transformer.``, ``model.``), in whatever precision they are stored.

    A sequence ends at the tokenizer's end-of-sequence token, which is ``eos_id``, and at those that
    ``eos_token_id`` of generation_config.json names or, where that file names none, of config.json.

    A folder of adapters, with adapter_config.json as `save_adapters` and `peft` write it, stands
    for the base model that it names with the adapters added to its weights.

    Args:
        name_or_path: a folder, or a name such as ``gpt2`` or ``HuggingFaceTB/SmolLM2-135M``.
        dtype: of the computation: bfloat16 on accelerators. Softmax and logits are float32 all the
            same.
        param_dtype: of the parameters. Keep float32 for training.
        families: the kinds of models to choose from, the first that knows the folder's
            ``model_type``. One of your own: ``families=(mine, *fjax.models.FAMILIES)``.
        mesh: of devices, as `fjax.sharding.make_mesh` makes it. Each shard of a parameter is read
            straight onto its device, so that nothing ever holds the whole; what is computed is
            sharded as well. None: one device.
        remat: compute each block again for its gradient, for less memory.
        shapes_only: read no weights; ``params`` are `jax.ShapeDtypeStruct`s, for what can be
            compiled and counted without them.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there, or the hub does not have or
            give it.
        ValueError: if it is of no family (with those that there are), is a variant that computes
            something else, is quantised or a reward model, lacks tensors or has others (named), or
            tensors that are no finite floats, or if its tokenizer has ids that it has not; if the
            mesh does not divide its heads or a parameter; or for adapters
            that `load_adapters` refuses.

    `save_pretrained` has an example that writes a folder and reads it.
    """
    folder, family, config, adapted = open_folder(name_or_path, families)
    _refuse_reward_model(folder)
    if mesh is not None:
        check_heads(config, mesh)
    tokenizer = load_tokenizer(folder, config)
    eos_ids = end_ids(folder, tokenizer, config.vocab_size)
    if shapes_only:
        params = param_shapes(family, config, param_dtype, mesh)
    else:
        params, _ = load_params(folder, family, config, param_dtype, mesh=mesh)
        if adapted is not None:
            params = _merged(adapted, family, config, params)
    options = {"remat": True} if remat else {}
    model = LanguageModel(
        config,
        params,
        tokenizer,
        family.logits_fn(config, dtype=dtype, **options),
        family.decode_fn(config, dtype=dtype),
        partial(family.init_cache, config, dtype=dtype),
        max_length=config.max_length,
        bos_id=eos_ids[0] if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_ids=eos_ids,
        save=partial(
            save_pretrained,
            config=config,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            families=(family,),
        ),
    )
    return model if mesh is None else on_mesh(model, mesh, family.rules)


def _refuse_reward_model(folder: Path) -> None:
    kinds = str(read_json(folder / "config.json").get("architectures"))
    if "ForSequenceClassification" in kinds:
        raise ValueError(
            f"{folder} holds a reward model, {kinds:.80}, which gives a text a score and predicts "
            f"no token. Read it with fjax.models.load_reward_model; here a language model is asked "
            f"for."
        )


def _merged(folder: Path, family: Family, config: ModelConfig, params: Params) -> Params:
    """With the adapters of a folder added, each matrix where it lies."""
    adapters, alpha = load_adapters(folder, params, config, families=(family,))
    merged = merge_lora(params, adapters, alpha=alpha)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), merged, params)


def load_reward_model(
    name_or_path: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    families: Sequence[Family] = FAMILIES,
) -> RewardModel:
    """Loads a model with a scalar head, as `save_reward_model` wrote it.

    Or as transformers' class for sequence classification with one label did.

    Args:
        name_or_path: a folder, or a name on the hub.
        dtype: of the computation.
        param_dtype: of the parameters.
        families: see `from_pretrained`.

    Raises:
        FileNotFoundError: if the folder, or a file in it, is not there.
        ValueError: if it has no scalar head, is of a family without one, or anything else that
            `from_pretrained` refuses.
    """
    folder, family, config, adapted = open_folder(name_or_path, families)
    if adapted is not None:
        raise ValueError(
            f"{adapted} holds adapters, which fjax adds to language models alone. Merge them with "
            f"peft's merge_and_unload, and save the whole reward model."
        )
    if family.score_fn is None:
        raise ValueError(f"{folder} holds a {family.name}, and that family has no reward models.")
    text_format = read_json(folder / "config.json").get("text_format")
    if text_format not in (None, *TEXT_FORMATS):
        raise ValueError(
            f"{folder} has text_format={text_format!r} in its config.json; fjax knows "
            f"{', '.join(TEXT_FORMATS)}."
        )
    tokenizer = load_tokenizer(folder, config)
    params, score = load_params(folder, family, config, param_dtype, head=True)
    params = {"transformer": params, "score": {"kernel": score}}
    return RewardModel(config, params, tokenizer, family.score_fn(config, dtype=dtype), text_format)
