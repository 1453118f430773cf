"""What is known of a base model, for the card of the model that is aligned from it."""

import re
from pathlib import Path

from huggingface_hub import metadata_load

from .settings import BUILT_IN

CARRIED = ("language", "license", "license_name", "license_link")
"""Of the front matter of a folder's own card: it holds of what is trained from the model, too."""

NAME = r"[\w.-]+(/[\w.-]+)?"
"""Of a model on the hub."""


def base_card(model: str) -> dict[str, str | list[str]]:
    """Front matter of the card of what is aligned from the model, a folder or a name on the hub.

    The name is given to what has one there; of a folder, the licence and the language that its
    card has.
    """
    folder = BUILT_IN if model == "built-in" else Path(model)
    if not folder.is_dir():
        return {"base_model": model} if re.fullmatch(NAME, model) else {}
    path = folder / "README.md"
    try:
        known = (metadata_load(path) if path.is_file() else None) or {}
    except Exception:  # whatever somebody's README may have between lines of dashes
        return {}
    return {name: known[name] for name in CARRIED if isinstance(known.get(name), (str, list))}
