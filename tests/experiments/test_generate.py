"""Quasi-rejection from a saved model: everything accepted has the word, at about the rate that was asked for."""

import numpy as np
import pytest

from experiments import generate
from experiments._run_folder import RunError
from fjax.training import read_jsonl

from .commands import TINY, run

MODELS = ("--model", TINY, "--base", TINY, "--max-new-tokens", 8, "--batch-size", 64)


def test_everything_accepted_has_the_word(monkeypatch, capsys, tmp_path):
    output = tmp_path / "texts.jsonl"
    arguments = (*MODELS, "--word", "w9", "--samples", 20, "--acceptance-rate", 0.2, "--output", output)
    assert run(monkeypatch, generate.Config, generate.main, *arguments) == 0
    assert "of which 100% have the word" in " ".join(capsys.readouterr().out.split())
    texts = [record["text"] for record in read_jsonl(output)]
    assert len(texts) == 20
    assert all("w9" in text.split() for text in texts)


def test_beta_is_chosen_for_the_rate():
    rng = np.random.default_rng(0)
    log_score = np.where(rng.uniform(size=2000) < 0.5, rng.normal(size=2000), -np.inf).astype(np.float32)
    log_beta = generate.choose_log_beta(log_score, np.zeros(2000, np.float32), 0.1)
    assert np.minimum(np.exp(log_score - log_beta), 1).mean() == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(RunError, match="None of 3 proposals has the word"):
        generate.choose_log_beta(np.full(3, -np.inf), np.zeros(3), 0.1)


def test_bad_input_is_named(monkeypatch, capsys):
    assert run(monkeypatch, generate.Config, generate.main, *MODELS, "--word", "nowhere") == 2
    assert "None of 48 proposals has the word" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, generate.Config, generate.main, *MODELS, "--word", "w9", "--acceptance-rate", 0) == 2
    assert "--acceptance-rate must be in (0, 1]" in capsys.readouterr().err
