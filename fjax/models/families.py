"""The families that fjax knows. A new one is a file beside these and a line here."""

from importlib import import_module

from fjax.models.base import Family

__all__ = ["FAMILIES"]

_MODULES = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
)

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f"fjax.models.{name}").FAMILY for name in _MODULES
)
"""Every family by which `fjax.from_pretrained` reads a folder, unless it is given others."""
