"""Hugging Face folders in and out, without torch.

Configuration and tokenizer go through transformers, weights by name.

This is the only package that knows transformers and safetensors, and it imports them on use, since
transformers alone takes seconds. It knows no family by name: all that is particular to one is in
the `fjax.models.Family` that it is given. Parameters carry the checkpoint's names and layout, so a
tensor is found by its path: ``h_3/attn/c_attn/kernel`` is ``h.3.attn.c_attn.weight``.
"""

from fjax.models.base import TEXT_FORMATS, PretrainedModel, RewardModel
from fjax.models.huggingface.adapters import load_adapters, save_adapters
from fjax.models.huggingface.load import from_pretrained, load_reward_model
from fjax.models.huggingface.save import save_pretrained, save_reward_model

__all__ = [
    "TEXT_FORMATS",
    "PretrainedModel",
    "RewardModel",
    "from_pretrained",
    "load_adapters",
    "load_reward_model",
    "save_adapters",
    "save_pretrained",
    "save_reward_model",
]
