"""Quasi-rejection from a saved model towards any target: everything accepted satisfies a hard
constraint, at about the rate that was asked for; and prompts, each with a target of its own."""

import json
import re

import jax
import numpy as np
import pytest

from experiments.tools import generate
from experiments.tools.quasi_rejection import Proposals, beta_of_rate
from experiments.tools.rejection_costs import Half, costs
from experiments.tools.target_of_run import of_run
from fjax.runs import RunError
from fjax.training import read_jsonl
from tests import pictures

from .commands import TINY, run

MODELS = ("--model", TINY, "--base", TINY, "--max-new-tokens", 8, "--batch-size", 64)


def test_everything_accepted_has_the_word(monkeypatch, capsys, tmp_path):
    pictures.small(monkeypatch, empty=False)
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
    assert re.search(r"satisfaction │ 0\.\d+ │ 1\.000 │", printed)
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
    zeros = np.zeros(2000, np.float32)
    log_beta = beta_of_rate(Proposals([""] * 2000, log_score, zeros, log_score, {}), 0.1)
    assert np.minimum(np.exp(log_score - log_beta), 1).mean() == pytest.approx(0.1, rel=1e-3)


def test_a_run_says_all_by_itself(lexical_run, monkeypatch, tmp_path, capsys):
    """Target, models and lengths; the samples are those of the same flags."""
    given = "--batch-size", 64, "--samples", 5
    by_flags = "--word", "w9", "--model", lexical_run.folder / "model", "--base", TINY
    texts = []
    for i, words in enumerate((("--run", lexical_run.folder), (*by_flags, "--max-new-tokens", 8))):
        output = tmp_path / f"{i}.jsonl"
        assert run(monkeypatch, generate.main, *words, *given, "--output", output) == 0
        texts.append(read_jsonl(output))
    assert texts[0] == texts[1]
    assert len(texts[0]) == 5


def says_it(prompt, completion):
    """Whether the last word of the prompt is said again."""
    return prompt.split()[-1] in completion.split()


@pytest.mark.command
def test_prompts_each_have_a_target_of_their_own(monkeypatch, tmp_path, capsys):
    """Of the task's prompts the first two; what is kept satisfies the hard constraint of each."""
    (tmp_path / "p.txt").write_text("".join(f"w1 w{i}\n" for i in (9, 27, 5, 12, 8, 20, 33, 41)))
    (tmp_path / "more.txt").write_text("w3 w26\nw4 w42\nw5 w9\n")
    task = ("conditional", "--predicate", f"{__name__}:says_it", "--model", TINY)
    task += ("--prompts", tmp_path / "p.txt", "--prompts-per-step", 2, "--max-new-tokens", 8)
    ours = ("--model", TINY, "--batch-size", 64, "--samples", 3, "--acceptance-rate", 0.05)
    given = ("--prompts", tmp_path / "more.txt", "--max-prompts", 2, "--output", tmp_path / "o")
    assert run(monkeypatch, generate.main, *ours, *given, *task) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Over 2 prompts: acceptance rate 0." in printed
    rows = read_jsonl(tmp_path / "o")
    assert [row["prompt"] for row in rows] == ["w3 w26"] * 3 + ["w4 w42"] * 3
    assert all(says_it(row["prompt"], row["text"]) for row in rows)
    assert run(monkeypatch, generate.main, *ours, "--plot", tmp_path / "x.png", *task) == 2
    assert "each prompt has one of its own" in capsys.readouterr().err


def test_bad_input_is_named(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, generate.main, *MODELS, "--word", "nowhere") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "None of 48 proposals is possible under the target p(x) ∝ a(x)·[nowhere in x]" in shown
    both = (*MODELS, "--word", "w9")
    for arguments, message in (
        (MODELS, "Say once which target is meant"),
        ((*both, "--run", "runs/x"), "Say once which target is meant"),
        (("--word", "w9"), "--model must be the folder of the aligned model"),
        ((*both, "--prompts", "p.txt"), "this one of lexical_constraint has none"),
        (("--run", tmp_path), "is no run folder"),
        ((*both, "--log-beta", "nan"), "--log-beta must be at least"),
    ):
        assert run(monkeypatch, generate.main, *arguments) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m experiments.pretrain --steps 1", "which is none of the tasks"),
        ("fjax lexical_constraint --wurd w9", "none that this version of fjax reads"),
        ("fjax lexical_constraint --word ''", "none that this version of fjax reads"),
    ],
)
def test_a_run_that_cannot_be_read_is_named(command, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"command": command}))
    with pytest.raises(RunError, match=message):
        of_run(tmp_path)


def test_a_rate_is_within_its_range(monkeypatch, capsys):
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
