"""Whole words in texts.

A word is found where no letter, digit or underscore goes on before or after it: "film" is in
"film's" and "non-film", not in "films". Scripts that put no spaces between words (Chinese,
Japanese, Thai, …) show no such ends, so there a word is found wherever its characters are:
电影 is in 这部电影很好. Upper and lower case are alike, and so are spellings that Unicode calls
compatible (é of one code point or of two, full width, ligatures), ß and ss, İ and i, ’ and ', and
any spaces between words. Accents are not: "cafe" is not in "café"; nor is ı, the dotless one, an i.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from fjax.runs import RunError

UNSPACED = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "JAVANESE",
    "BALINESE",
)
"""How Unicode's names of their characters begin, in scripts without spaces between words."""

_ALIKE = str.maketrans({"’": "'", "‐": "-"})
"""What NFKC keeps apart though nobody who types means a difference."""


def contains_any(words: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Whether each text has one of the words as a whole word, in upper or lower case.

    Raises:
        RunError: if a word has no characters but spaces; it would be in every text.
    """
    wanted = [_normal(word) for word in words]
    if not all(wanted):
        raise RunError(
            f"An empty word cannot be looked for; the words are {', '.join(map(repr, words))}."
        )
    normal = map(_normal, texts)
    return np.array([any(_contains(text, word) for word in wanted) for text in normal], bool)


def highlight(words: Sequence[str]) -> str:
    """A regular expression of the words, for `fjax.evaluation.TextTarget.highlight`.

    Whole words as they are written here, in upper or lower case. Of spellings that `contains_any`
    takes for alike, and of words in scripts without spaces, it finds fewer.

    >>> re.findall(highlight(["great", "so so"]), "Great , so  so and not the greatest")
    ['Great', 'so  so']
    """
    written = (r"\s+".join(map(re.escape, word.split())) for word in words)
    return rf"(?i)(?<!\w)(?:{'|'.join(written)})(?!\w)"


def _normal(text: str) -> str:
    """One spelling of what is alike; casefolding may undo the composition, hence twice."""
    folded = unicodedata.normalize("NFKC", text).translate(_ALIKE).casefold()
    # İ is casefolded to an i with a second dot, which no Turkish text has.
    return " ".join(unicodedata.normalize("NFKC", folded.replace("i\u0307", "i")).split())


def _contains(text: str, word: str) -> bool:
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        # A mark behind the word changes its last letter, in any script.
        before = start > 0 and _goes_on(word[0], text[start - 1])
        after = end < len(text) and (_is_mark(text[end]) or _goes_on(word[-1], text[end]))
        if not (before or after):
            return True
        start = text.find(word, start + 1)
    return False


def _goes_on(edge: str, beside: str) -> bool:
    """Whether the character beside a word's first or last one belongs to the same word."""
    in_words = beside == "_" or unicodedata.category(beside)[0] in "LMN"
    return in_words and not any(
        unicodedata.name(character, "").startswith(UNSPACED) for character in (edge, beside)
    )


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"
