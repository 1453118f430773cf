"""Language models as pure functions, and their Hugging Face folders."""

from fjax.models import gpt2
from fjax.models.huggingface import PretrainedModel, from_pretrained, save_pretrained

__all__ = ["PretrainedModel", "from_pretrained", "gpt2", "save_pretrained"]
