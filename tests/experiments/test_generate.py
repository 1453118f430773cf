"""Quasi-rejection from a saved model: everything accepted has the word, at about the rate that was
asked for."""

import jax
import numpy as np
import pytest

from experiments.tools import generate
from experiments.tools.rejection_costs import Half, costs
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import TINY, run

MODELS = ("--model", TINY, "--base", TINY, "--max-new-tokens", 8, "--batch-size", 64)


@pytest.mark.command
def test_everything_accepted_has_the_word(monkeypatch, capsys, tmp_path):
    output = tmp_path / "texts.jsonl"
    arguments = (
        *MODELS,
        "--word",
        "w9",
        "--samples",
        20,
        "--acceptance-rate",
        0.2,
        "--output",
        output,
        "--plot",
        tmp_path / "costs.png",
    )
    assert run(monkeypatch, generate.main, *arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of which 100% have the word" in printed
    assert "what β costs and is worth" in printed
    assert (tmp_path / "costs.png").read_bytes()[:4] == b"\x89PNG"
    texts = [record["text"] for record in read_jsonl(output)]
    assert len(texts) == 20
    assert all("w9" in text.split() for text in texts)


def test_costs_are_predicted_within_their_errors():
    """q uniform on 8 outcomes, P known: acceptance Σ min(P/β, q) and the bound 1 - Σ min(P, βq)/Z,
    exactly."""
    p = np.array([0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2], np.float32)
    rng = np.random.default_rng(0)

    def half():
        x = rng.integers(8, size=4000)
        with np.errstate(divide="ignore"):
            log_score, log_q = np.log(p[x]), np.full(4000, np.log(1 / 8), np.float32)
        return Half(log_score, log_q, log_score - log_q)

    for cost in costs(half(), half(), log_beta=1.0, rng_key=jax.random.key(0)):
        beta = np.exp(cost.log_beta)
        rate, bound = np.minimum(p / beta, 1 / 8).sum(), 1 - np.minimum(p, beta / 8).sum() / p.sum()
        for figure, exact in zip(cost[1:], (rate, rate, bound, bound), strict=True):
            # 4 standard errors; 28 comparisons
            assert abs(figure.value - exact) < 4 * figure.std_error + 1e-6


def test_beta_is_chosen_for_the_rate():
    rng = np.random.default_rng(0)
    log_score = np.where(rng.uniform(size=2000) < 0.5, rng.normal(size=2000), -np.inf).astype(
        np.float32
    )
    log_beta = generate.choose_beta(log_score, np.zeros(2000, np.float32), 0.1)
    assert np.minimum(np.exp(log_score - log_beta), 1).mean() == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(RunError, match="None of 3 proposals has the word"):
        generate.choose_beta(np.full(3, -np.inf), np.zeros(3), 0.1)


def test_bad_input_is_named(monkeypatch, capsys):
    assert run(monkeypatch, generate.main, *MODELS, "--word", "nowhere") == 2
    assert "None of 48 proposals has the word" in " ".join(capsys.readouterr().err.split())
    assert (
        run(
            monkeypatch,
            generate.main,
            *MODELS,
            "--word",
            "w9",
            "--acceptance-rate",
            0,
        )
        == 2
    )
    assert "--acceptance-rate must be at least 1e-06" in capsys.readouterr().err
