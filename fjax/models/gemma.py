"""Gemma: a Llama with embeddings times √D, scales of norms that begin at 0, and a GELU for a gate.

Source: Mesnard et al. 2024 (arXiv 2403.08295), section 2.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fjax.models import llama
from fjax.models.llama import LlamaConfig

__all__ = ["FAMILY"]

# Where transformers takes other values than Llama's for what a config.json does not say.
_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def _read_config(raw: Mapping[str, Any]) -> LlamaConfig:
    if raw.get("use_bidirectional_attention"):
        raise ValueError("it has use_bidirectional_attention, and fjax predicts from the left.")
    # The first files say gelu, and mean its approximation.
    act = {"hidden_act": _DEFAULTS["hidden_act"]} if raw.get("hidden_act") == "gelu" else {}
    bias = raw.get("attention_bias", False)
    fixed = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": False, "norm_offset": 1.0, **act}
    config = llama.read_config(raw, defaults=_DEFAULTS, **fixed)
    return dataclasses.replace(config, embedding_scale=math.sqrt(config.width))


def _write_config(config: LlamaConfig) -> dict[str, Any]:
    said = {"architectures": ["GemmaForCausalLM"], "attention_bias": config.qkv_bias}
    return llama.write_config(config, _read_config, **said)


FAMILY = llama.FAMILY._replace(
    name="Gemma",
    model_types=("gemma",),
    read_config=_read_config,
    write_config=_write_config,
    score_architecture="GemmaForSequenceClassification",
)
"""Gemma as `fjax.from_pretrained` reads it."""
