"""The families that fjax knows. A new one is a file beside `fjax.models.gpt2` and a line here."""

from fjax.models import gpt2, llama
from fjax.models.base import Family

__all__ = ["FAMILIES"]

FAMILIES: tuple[Family, ...] = (gpt2.FAMILY, llama.FAMILY)
"""Every family by which `fjax.from_pretrained` reads a folder, unless it is given others."""
