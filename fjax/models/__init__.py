"""Language models as pure functions, the families of them, and their Hugging Face folders."""

from fjax.models import (
    _extra,  # noqa: F401 - before all that needs it
    gpt2,
    llama,
)
from fjax.models.base import Family, KVCache, LanguageModel, PretrainedModel, RewardModel
from fjax.models.families import FAMILIES
from fjax.models.huggingface import (
    from_pretrained,
    load_adapters,
    load_reward_model,
    save_adapters,
    save_pretrained,
    save_reward_model,
)
from fjax.models.sharded import shard_model

__all__ = [
    "FAMILIES",
    "Family",
    "KVCache",
    "LanguageModel",
    "PretrainedModel",
    "RewardModel",
    "from_pretrained",
    "gpt2",
    "llama",
    "load_adapters",
    "load_reward_model",
    "save_adapters",
    "save_pretrained",
    "save_reward_model",
    "shard_model",
]
