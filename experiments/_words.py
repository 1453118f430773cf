"""Texts: whole words in them, and how they are shown."""

import re
from collections.abc import Sequence

import numpy as np


def contains_any(words: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Whether each text has one of the words as a whole word, in upper or lower case."""
    # Not \\b: a word may begin or end with what is no letter ("c++", "'s").
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return np.array([pattern.search(text) is not None for text in texts])


def on_one_line(text: str) -> str:
    """A text as it is shown: spaces for line ends, and nothing in it that would steer a terminal or hide itself."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
