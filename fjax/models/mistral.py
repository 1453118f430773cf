"""Mistral: a Llama that may attend to the last tokens only.

fjax reads those whose window is none, or no shorter than their texts.

Source: Jiang et al. 2023 (arXiv 2310.06825), section 2.
"""

from collections.abc import Mapping
from typing import Any

from fjax.models import llama
from fjax.models.llama import LlamaConfig

__all__ = ["FAMILY"]

# Where transformers takes other values than Llama's for what a config.json does not say.
_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}


def _read_config(raw: Mapping[str, Any]) -> LlamaConfig:
    no_biases = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    config = llama.read_config(raw, defaults=_DEFAULTS, **no_biases)
    llama.refuse_window(raw.get("sliding_window", 4096), config)
    return config


def _write_config(config: LlamaConfig) -> dict[str, Any]:
    said = {"architectures": ["MistralForCausalLM"], "sliding_window": None}
    return llama.write_config(config, _read_config, **said)


FAMILY = llama.FAMILY._replace(
    name="Mistral",
    model_types=("mistral",),
    read_config=_read_config,
    write_config=_write_config,
    score_architecture="MistralForSequenceClassification",
)
"""Mistral as `fjax.from_pretrained` reads it."""
