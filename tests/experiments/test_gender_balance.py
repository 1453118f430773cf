"""Distributional control on the tiny model: moments parsed, fitted, reported when impossible; a run
of two steps."""

import re

import numpy as np
import pytest

from experiments.common.settings import Settings
from experiments.common.words import contains_any
from experiments.gender_balance.__main__ import main
from experiments.gender_balance.config import Config, parse_moments
from experiments.gender_balance.target import TASK, make_features, make_target
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, run

WORDS = ("--woman", "w9 w19", "--man", "w26 w42", "--fit-samples", 256)


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, main, *arguments)


def test_words_and_balance():
    texts = ["she said", "he and SHE", "shell", "a man", ""]
    assert contains_any(["she", "her"], texts).tolist() == [1, 1, 0, 0, 0]
    features = make_features(Config(share=0.25, moments=("said|a=0.5",)), texts)
    assert features["gendered"].tolist() == [1, 1, 0, 1, 0]
    assert features["balance"].tolist() == [0.75, 0.75, 0, -0.25, 0]
    assert features["[said|a]"].tolist() == [1, 0, 0, 1, 0]


def test_moments_are_parsed():
    assert parse_moments(("love=0.1", "a=b=1")) == [("love", 0.1), ("a=b", 1.0)]


@pytest.mark.command
def test_two_steps(experiment, tmp_path, capsys):
    settings = (*SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment(*WORDS, "--moments", "w27=0.6", *settings) == 0
    printed = capsys.readouterr().out
    assert "moments, fitted to" in printed
    assert "nats away from the base model" in printed
    records = [
        r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"
    ]
    assert {"share of women", "balance", "[w27]", "forward_kl"} <= records[0].keys()
    assert np.isfinite([r["share of women_std_error"] for r in records]).all()
    assert np.isfinite([r["reverse_kl"] for r in records]).all()  # nothing is impossible under p


def configured(**options) -> Config:
    """As the run above, but for what is given."""
    settings = Settings(model=str(TINY), samples=16, max_new_tokens=8)
    words = {"woman": "w9 w19", "man": "w26 w42", "fit_samples": 256}
    return Config(**words | options, settings=settings)


@pytest.fixture(scope="module")
def built():
    return build(TASK, configured())


def test_a_hybrid_has_a_hard_constraint(built):
    """P is 0 where the word of a moment of 1 is not, and there alone; so reverse KL is infinite."""
    target = make_target(configured(moments=("w27=1",)), built)
    features = target.features([""] * 3, ["w27 w9", "w9", "w27 w26"])
    log_score = target.log_score(np.zeros(3, np.float32), features)
    assert np.isneginf(log_score).tolist() == [False, True, False]
    assert log_score[0] != log_score[2]  # by the soft moment, a woman and a man
    assert target.description.endswith(
        "women in 0.5 of the gendered samples, 1 of the samples with w27"
    )
    assert re.findall(target.highlight, "w27 w9 w2 W42") == ["w27", "w9", "W42"]


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (("nowhere=0.5",), "has a mean of 0.5 of '[nowhere]', which is between 0 and 0"),
        (("w9=0.9", "w9|w19=0.1"), "contradict each other"),
    ],
)
def test_moments_that_cannot_be_had_are_named_before_any_step(built, moments, message):
    with pytest.raises(RunError) as error:
        make_target(configured(moments=moments), built)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moments": ("w9",)}, '"word=rate"'),
        ({"moments": ("w9=1.5",)}, '"word=rate"'),
        ({"moments": ("w9=0.5", "w9=0.6")}, "the same words twice"),
        ({"share": 1.0}, "--share must be at least 1e-06"),
        ({"woman": " "}, "must each name at least one word"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        configured(**options)


def test_the_command_says_it_in_a_sentence_and_begins_nothing(experiment, tmp_path, capsys):
    arguments = (*WORDS, *SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment(*arguments, "--moments", "nowhere=0.5") == 2
    assert "which is between 0 and 0" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
