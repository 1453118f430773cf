"""What a whole word is, in scripts with spaces and without, and in spellings that only differ to a
computer."""

import re
import unicodedata

import numpy as np
import pytest

from experiments.common.words import contains_any, highlight
from fjax.runs import RunError


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("电影", "这部电影很好"),
        ("映画", "この映画はよい"),
        ("カメラ", "ｶﾒﾗで撮った"),
        ("หนัง", "ดูหนังสนุก"),
        ("great", "电影great很好"),
        ("电影", "great电影great"),
        ("café", unicodedata.normalize("NFD", "a café .")),
        (unicodedata.normalize("NFD", "café"), "a café ."),
        (" great", "a great film"),
        ("not  bad ", "it 's not\nbad"),
        ("great", "a ＧＲＥＡＴ film"),
        ("strasse", "die Straße"),
        ("STRASSE", "die straße"),
        ("istanbul", "İSTANBUL"),
        ("İstanbul", "in istanbul ."),
        ("istanbul", "İstanbul".lower()),
        ("ΣΟΦΟΣ", "σοφος"),
        ("don't", "i don’t know"),
        ("film", "the film's end"),
        ("made", "a well-made film"),
        ("well-made", "a well‑made film"),
        ("greatest", "greater than the greatest"),
        ("a a", "a aa a a"),
        ("nan", "nan"),
        ("किताब", "यह किताब है"),
        ("7", "7 films"),
    ],
)
def test_a_word_is_found(word, text):
    assert contains_any([word], [text]).tolist() == [True]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("great", "greatness ungreat great_ _great great2"),
        ("cafe", unicodedata.normalize("NFD", "a café")),
        ("cafe", "a café"),
        ("क", "यह किताब है"),
        ("ताब", "यह किताब है"),
        ("ก", "กิน"),
        ("电影", "电视"),
        ("sınır", "SINIR"),
        ("영화", "영화는"),
        ("nan", "banana"),
        ("q̃", "q"),
        ("q", "q̃"),
    ],
)
def test_what_is_no_whole_word_is_not_found(word, text):
    assert contains_any([word], [text]).tolist() == [False]


def test_any_of_several_words_in_each_of_several_texts():
    found = contains_any(["great", "greatest"], ["the greatest", "great", "greater", ""])
    assert found.tolist() == [True, True, False, False]
    assert found.dtype == bool
    assert contains_any(["great"], []).dtype == np.dtype(bool)
    assert contains_any([], ["great"]).tolist() == [False]


def test_what_is_highlighted_are_whole_words_as_they_are_written():
    pattern = highlight(["great", "c++", "so  so"])
    assert re.findall(pattern, "GREAT greater c++ c+ so so") == ["GREAT", "c++", "so so"]
    assert re.findall(highlight([".*"]), "anything") == []


@pytest.mark.parametrize("empty", ["", " ", "\u3000\n"])
def test_an_empty_word_is_in_no_text(empty):
    with pytest.raises(RunError, match="An empty word cannot be looked for"):
        contains_any(["great", empty], ["a text"])
