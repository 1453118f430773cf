"""Distributional control on the tiny model: moments parsed, fitted, reported when impossible; a run
of two steps."""

import numpy as np
import pytest

from experiments._words import contains_any
from experiments.gender_balance.config import Config, parse_moments
from experiments.gender_balance.run import main, make_features
from fjax.training import read_jsonl

from .commands import SMALL, run

WORDS = ("--woman", "w9 w19", "--man", "w26 w42", "--fit-samples", 256)


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, Config, main, *arguments)


def test_words_and_balance():
    texts = ["she said", "he and SHE", "shell", "a man", ""]
    assert contains_any(["she", "her"], texts).tolist() == [1, 1, 0, 0, 0]
    features = make_features(Config(share=0.25, moments=("said|a=0.5",)), texts)
    assert features["gendered"].tolist() == [1, 1, 0, 1, 0]
    assert features["balance"].tolist() == [0.75, 0.75, 0, -0.25, 0]
    assert features["[said|a]"].tolist() == [1, 0, 0, 1, 0]


def test_moments_are_parsed():
    assert parse_moments(("love=0.1", "a=b=1")) == [("love", 0.1), ("a=b", 1.0)]


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


def test_a_hybrid_has_a_hard_constraint(experiment, tmp_path):
    settings = (*SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment(*WORDS, "--moments", "w27=1", *settings) == 0
    first = next(
        r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"
    )
    assert first["reverse_kl"] == np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--moments", "nowhere=0.5"),
            "has a mean of 0.5 of '[nowhere]', which is between 0 and 0",
        ),
        (("--moments", "w9=0.9", "w9|w19=0.1"), "contradict each other"),
        (("--moments", "w9"), '"word=rate"'),
        (("--moments", "w9=1.5"), '"word=rate"'),
        (("--moments", "w9=0.5", "w9=0.6"), "the same words twice"),
        (("--share", 1.0), "--share must be at least 1e-06"),
        (("--woman", " "), "must each name at least one word"),
    ],
)
def test_moments_that_cannot_be_had_are_named_before_any_step(
    experiment, tmp_path, capsys, arguments, message
):
    assert (
        experiment(*WORDS, *SMALL, "--steps", 2, "--run-folder", tmp_path / "run", *arguments) == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
