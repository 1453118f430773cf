"""Llama as a family: its config.json, the names of its tensors, and where a mesh has them."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from fjax.models.base import Family
from fjax.models.llama.config import LlamaConfig, read_config, write_config
from fjax.models.llama.functions import decode_fn, init_cache, init_params, logits_fn, score_fn

__all__ = ["FAMILY", "RULES"]


def _read_llama(raw: Mapping[str, Any]) -> LlamaConfig:
    bias = raw.get("attention_bias", False)
    return read_config(raw, qkv_bias=bias, output_bias=bias)


def _write_llama(config: LlamaConfig) -> dict[str, Any]:
    said = {"architectures": ["LlamaForCausalLM"], "attention_bias": config.qkv_bias}
    return write_config(config, _read_llama, **said)


def _tensor_name(path: tuple[str, ...]) -> str:
    """``layers_3/mlp/up_proj/weight`` is ``model.layers.3.mlp.up_proj.weight``."""
    name = ".".join(path).replace("layers_", "layers.")
    return name if name.startswith("lm_head") else f"model.{name}"


RULES = (
    # The hidden units of a block are sharded: on the way in, and summed over on the way out.
    (r"(q|k|v|gate|up)_proj/weight(/matrix)?$", (PartitionSpec("tensor", "fsdp"),)),
    (r"(q|k|v|gate|up)_proj/bias$", (PartitionSpec("tensor"),)),
    (r"(o|down)_proj/weight(/matrix)?$", (PartitionSpec("fsdp", "tensor"),)),
    # By tokens where their number can be divided.
    (
        r"(embed_tokens|lm_head)/weight(/matrix)?$",
        (PartitionSpec("tensor", "fsdp"), PartitionSpec(None, ("tensor", "fsdp"))),
    ),
)
"""How parameters are sharded; norms and other biases are too small for it."""

FAMILY = Family(
    name="Llama",
    model_types=("llama",),
    config_type=LlamaConfig,
    read_config=_read_llama,
    write_config=_write_llama,
    init_params=init_params,
    tensor_name=_tensor_name,
    logits_fn=logits_fn,
    decode_fn=decode_fn,
    init_cache=init_cache,
    prefix="model.",
    tied=lambda config: (
        {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}
    ),
    # the frequencies, which the first checkpoints have among their weights
    buffers=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    embedding="model.embed_tokens.weight",
    head="lm_head",
    rules=RULES,
    score_fn=score_fn,
    score_architecture="LlamaForSequenceClassification",
)
"""Llama as `fjax.from_pretrained` reads it."""
