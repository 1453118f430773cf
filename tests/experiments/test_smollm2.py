"""What the alignments of SmolLM2 are measured by: its scorers and its questions."""

import doctest
from pathlib import Path

import pytest

from experiments.smollm2 import scorers
from fjax.training import read_jsonl

FOLDER = Path(scorers.__file__).parent


def test_scorers_do_as_their_examples_say():
    done = doctest.testmod(scorers)
    assert done.attempted == 3
    assert done.failed == 0


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (" It rains. ", 1),
        ("Does it rain?", 1),
        ("“It rains.”", 1),
        ("It rains, or so they say!", 1),
        ("It rains", 0),
        ("It rains. It", 0),
        ("One:\nit rains.", 0),
        ("- it rains.\n- it snows.", 0),
        ("", 0),
        (".", 0),
    ],
)
def test_one_finished_sentence_and_nothing_else(text, is_one):
    assert scorers.one_sentence([text]) == [is_one]


def test_no_question_is_both_aligned_on_and_evaluated_on():
    asked, unseen = (
        [line["prompt"][-1]["content"] for line in read_jsonl(FOLDER / name)]
        for name in ("questions.jsonl", "unseen_questions.jsonl")
    )
    assert (len(set(asked)), len(set(unseen))) == (64, 32)
    assert not {*asked} & {*unseen}
