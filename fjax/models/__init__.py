"""Language models as pure functions, and their Hugging Face folders."""

from fjax.models import gpt2
from fjax.models.huggingface import (
    PretrainedModel,
    RewardModel,
    from_pretrained,
    load_reward_model,
    save_pretrained,
    save_reward_model,
)

__all__ = [
    "PretrainedModel",
    "RewardModel",
    "from_pretrained",
    "gpt2",
    "load_reward_model",
    "save_pretrained",
    "save_reward_model",
]
