"""Llama (Touvron et al. 2023) and its relatives, as pure functions over a plain tree of parameters.

RMS norms, rotary positions, heads that share keys and values, a gated MLP. What relatives do
otherwise is a few fields of one configuration, so each is a file like `fjax.models.qwen2`, which
says what its config.json means, and a line in ``fjax/models/families.py``.

Names in the tree of parameters are those of the Hugging Face checkpoint, and weights keep its
``[out, in]`` layout: ``layers_3/mlp/up_proj/weight`` is ``model.layers.3.mlp.up_proj.weight``.
"""

from fjax.models.llama.config import LlamaConfig, read_config, refuse_window, write_config
from fjax.models.llama.family import FAMILY, RULES
from fjax.models.llama.functions import decode_fn, init_cache, init_params, logits_fn, score_fn

__all__ = [
    "FAMILY",
    "RULES",
    "LlamaConfig",
    "decode_fn",
    "init_cache",
    "init_params",
    "logits_fn",
    "read_config",
    "refuse_window",
    "score_fn",
    "write_config",
]
