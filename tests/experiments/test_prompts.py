"""Prompts as the sampler wants them, files of prompts with whatever may be wrong in them, and the
built-in openings."""

import numpy as np
import pytest

import fjax
from experiments.common.corpora import held_out, read_labels
from experiments.common.prompts import encode, openings, read_prompts, token_ids
from experiments.common.settings import BUILT_IN
from fjax.runs import RunError

from .commands import TINY


@pytest.fixture(scope="module")
def tokenizer():
    return fjax.from_pretrained(BUILT_IN).tokenizer


@pytest.fixture(scope="module")
def tiny():
    """Whole words w0 … w59; 60 is the end."""
    return fjax.from_pretrained(TINY).tokenizer


def written(tmp_path, content: str | bytes):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_rows_are_padded_on_the_left_and_begin_with_the_end_token(tiny):
    prompts = encode(["w1 w2 w3", "w4"], tiny)
    assert prompts.tokens.tolist() == [[60, 1, 2, 3], [60, 60, 60, 4]]
    assert prompts.where.tolist() == [[True] * 4, [False, False, True, True]]
    assert prompts.tokens.dtype == np.int32
    assert prompts.references == ["", ""]


@pytest.mark.parametrize(
    "text",
    ["a film <|endoftext|> ends", "<|endoftext|>", "<|endoftext|><|endoftext|>", " <|endoftext|>"],
)
def test_a_text_that_spells_the_end_token_does_not_have_it(tokenizer, text):
    (row,) = token_ids(tokenizer, [text])
    assert tokenizer.eos_token_id not in row
    assert tokenizer.decode(row) == text
    assert encode([text], tokenizer).tokens.tolist() == [[tokenizer.eos_token_id, *row]]
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id]  # it is left as it was


def test_what_is_read_as_the_end_token_all_the_same_is_refused(tiny, tmp_path):
    """The tiny tokenizer has one token for the end and for words that it does not know."""
    with pytest.raises(
        RunError, match=r"reads a part of 'w1 film' as its end token '<|endoftext|>'"
    ):
        token_ids(tiny, ["w1", "w1 film"])
    path = written(tmp_path, "w1\nfilm w2\nw3\n")
    prompts, reports = read_prompts(path, tiny, max_tokens=9)
    assert prompts.texts == ["w1", "w3"]
    assert reports == [
        f"{path}, left out as read as '<|endoftext|>' by the tokenizer, in part: 1 line (2)."
    ]


def test_no_prompt_is_anything_but_text(tokenizer, tmp_path):
    path = written(tmp_path, "nan\r\nNone\r\ntrue\r\n1e3\r\n-inf\r\n{}\r\n")
    prompts, reports = read_prompts(path, tokenizer, max_tokens=9)
    assert prompts.texts == ["nan", "None", "true", "1e3", "-inf", "{}"]
    assert reports == []


def test_a_file_is_read_without_what_cannot_be_used(tiny, tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbfw1 w2\r\n\n  w3 \nw1 w2\nw1 w2 w3 w4\n \t\nw3\n")
    prompts, reports = read_prompts(path, tiny, max_tokens=3)
    assert prompts.texts == ["w1 w2", "w3"]
    assert prompts.tokens.tolist() == [[60, 1, 2], [60, 60, 3]]
    assert reports == [
        f"{path}, left out as blank: 2 lines (2, 6).",
        f"{path}, left out as repeated: 2 lines (4, 7).",
        f"{path}, left out as longer than 3 tokens: 1 line (5).",
    ]
    assert read_prompts(written(tmp_path, "w1\nw2"), tiny, max_tokens=1)[1] == []


def test_a_report_of_many_lines_is_short(tiny, tmp_path):
    _, (report,) = read_prompts(written(tmp_path, "w1\n" + "\n" * 3000), tiny, max_tokens=3)
    assert report.endswith("left out as blank: 3000 lines (2, 3, 4, 5, 6, 7, 8, 9, …).")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (
            "w1 w2\nw1 w3 w4\n\n",
            "There is no prompt in .* as blank: 1 line .3.. .*longer than 1 tokens: 2 lines .1, 2.",
        ),
        (b"w1\nw2 \xff\nw3", "Line 2 of .* is not UTF-8"),
        ("w1\nw2".encode("utf-16"), "Line 1 of .* is not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_named(tiny, tmp_path, content, message):
    with pytest.raises(RunError, match=message):
        read_prompts(written(tmp_path, content), tiny, max_tokens=1)


def test_a_file_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(RunError, match=r"Cannot read the prompts .*nowhere.*No such file"):
        read_prompts(tmp_path / "nowhere", tiny, max_tokens=1)


def test_openings_are_of_held_out_sentences_and_in_one_part_only(tokenizer):
    training, unseen = openings(tokenizer)
    texts = training.texts + unseen.texts
    assert len(set(texts)) == len(texts)
    assert {len(text.split()) for text in texts} == {4}
    assert 0.6 < len(training.texts) / len(texts) < 0.73
    assert len(unseen.texts) > 100
    snippets = read_labels(BUILT_IN.parent)
    for opening, rest in zip(texts, training.references + unseen.references, strict=True):
        assert opening + rest in snippets
        assert held_out(opening + rest)
        assert rest.startswith(" ")
        assert 8 <= len((opening + rest).split()) <= 30
    again = openings(tokenizer)[1]
    assert again.texts == unseen.texts
    assert {len(text.split()) for text in openings(tokenizer, words=2)[0].texts} == {2}


def test_prompt_and_reference_are_the_tokens_of_the_sentence(tokenizer):
    """The reference keeps the space of its first word, as a continuation of the model does."""
    _, unseen = openings(tokenizer)
    for i, (opening, rest) in enumerate(zip(unseen.texts, unseen.references, strict=True)):
        end, *prompt = unseen.tokens[i, unseen.where[i]].tolist()
        assert end == tokenizer.eos_token_id
        assert prompt + tokenizer(rest).input_ids == tokenizer(opening + rest).input_ids
