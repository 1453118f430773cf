"""Qwen2 and 2.5: a Llama with biases on queries, keys and values.

Source: Yang et al. 2024 (arXiv 2407.10671), section 2.2.
"""

from collections.abc import Mapping
from typing import Any

from fjax.models import llama
from fjax.models.llama import LlamaConfig

__all__ = ["DEFAULTS", "FAMILY", "refuse_windows"]

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
"""Where transformers takes other values than Llama's for what a config.json does not say."""


def refuse_windows(raw: Mapping[str, Any], config: LlamaConfig) -> None:
    """ValueError if some blocks attend to fewer tokens than a text may have."""
    kinds, first = raw.get("layer_types"), raw.get("max_window_layers", 28)
    if not (kinds is None or isinstance(kinds, list)) or any(k not in _KINDS for k in kinds or ()):
        raise ValueError(f"it has layer_types={kinds!r:.80}.")
    some = first < config.depth if isinstance(first, int) else True
    if raw.get("use_sliding_window") and (some if kinds is None else _KINDS[1] in kinds):
        llama.refuse_window(raw.get("sliding_window", 4096), config)


_KINDS = ["full_attention", "sliding_attention"]


def _read_config(raw: Mapping[str, Any]) -> LlamaConfig:
    biases = {"qkv_bias": True, "output_bias": False, "mlp_bias": False}
    config = llama.read_config(raw, defaults=DEFAULTS, **biases)
    refuse_windows(raw, config)
    return config


def _write_config(config: LlamaConfig) -> dict[str, Any]:
    said = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
    return llama.write_config(config, _read_config, **said)


FAMILY = llama.FAMILY._replace(
    name="Qwen2",
    model_types=("qwen2",),
    read_config=_read_config,
    write_config=_write_config,
    score_architecture="Qwen2ForSequenceClassification",
)
"""Qwen2 as `fjax.from_pretrained` reads it."""
