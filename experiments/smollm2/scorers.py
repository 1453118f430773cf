"""What the two alignments of SmolLM2 ask of an answer, in a form that can be checked by eye."""

import re
from collections.abc import Sequence

import numpy as np

SENTENCE = re.compile(r"[^\s.!?:;][^.!?\n]*[.!?][\"”’')]?")
"""One sentence: words, no line of its own, and what ends it."""

HER = re.compile(r"\b(she|her|hers|herself)\b", re.IGNORECASE)
HIM = re.compile(r"\b(he|him|his|himself)\b", re.IGNORECASE)


def one_sentence(texts: Sequence[str]) -> np.ndarray:
    """1 for an answer that is one finished sentence and nothing else, 0 for any other.

    >>> one_sentence(["Cats purr.", "Cats purr. Dogs do not.", "Cats purr when"])
    array([1., 0., 0.])
    """
    return np.array([SENTENCE.fullmatch(text.strip()) is not None for text in texts], float)


def about_a_woman(texts: Sequence[str]) -> np.ndarray:
    """1 for a story that says "she" more often than "he", in any of their cases; 0 for any other.

    >>> about_a_woman(["She saw her dog.", "He saw her.", "The dog slept."])
    array([1., 0., 0.])
    """
    return np.array([len(HER.findall(text)) > len(HIM.findall(text)) for text in texts], float)


def about_a_man(texts: Sequence[str]) -> np.ndarray:
    """1 for a story that says "he" more often than "she", in any of their cases; 0 for any other.

    >>> about_a_man(["She saw her dog.", "He saw his dog.", "The dog slept."])
    array([0., 1., 0.])
    """
    return np.array([len(HIM.findall(text)) > len(HER.findall(text)) for text in texts], float)
