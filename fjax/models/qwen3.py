"""Qwen3: a Llama whose queries and keys are normed, head by head.

Source: Yang et al. 2025 (arXiv 2505.09388), section 2.
"""

from collections.abc import Mapping
from typing import Any

from fjax.models import llama, qwen2
from fjax.models.llama import LlamaConfig

__all__ = ["FAMILY"]

_DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def _read_config(raw: Mapping[str, Any]) -> LlamaConfig:
    bias = raw.get("attention_bias", False)
    biases = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": False}
    config = llama.read_config(raw, defaults=_DEFAULTS, qk_norm=True, **biases)
    qwen2.refuse_windows(raw, config)
    return config


def _write_config(config: LlamaConfig) -> dict[str, Any]:
    said = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": config.qkv_bias}
    return llama.write_config(config, _read_config, use_sliding_window=False, **said)


FAMILY = llama.FAMILY._replace(
    name="Qwen3",
    model_types=("qwen3",),
    read_config=_read_config,
    write_config=_write_config,
    score_architecture="Qwen3ForSequenceClassification",
)
"""Qwen3 as `fjax.from_pretrained` reads it."""
