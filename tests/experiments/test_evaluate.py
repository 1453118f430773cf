"""Any saved model against any target; and the figures that a run writes, to whatever logger is
asked for."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import fjax
from experiments import evaluate
from experiments._programs import load_aligned
from experiments._run_folder import RunError
from experiments._settings import Settings
from experiments.lexical_constraint.config import Config
from experiments.lexical_constraint.run import main
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run
from .test_conditional import WORDS

LEXICAL = ("lexical_constraint", "--word", "w9", *SMALL)


def test_the_base_model_is_no_further_from_the_target_than_itself(monkeypatch, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ("--aligned", TINY, "--output", output, *LEXICAL)
    assert run(monkeypatch, evaluate.Config, evaluate.main, *arguments) == 0
    assert "KL(π‖a)" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert abs(found["figures"]["kl_to_base"]["value"]) < 1e-5
    assert found["figures"]["satisfaction"]["std_error"] > 0


def test_other_targets(monkeypatch, capsys):
    gender = (
        "gender_balance",
        "--woman",
        "w9 w19",
        "--man",
        "w26 w42",
        "--fit-samples",
        128,
        *SMALL,
    )
    assert run(monkeypatch, evaluate.Config, evaluate.main, "--aligned", TINY, *gender) == 0
    assert "share of women" in capsys.readouterr().out


def test_a_conditional_target_of_the_base_model_itself(monkeypatch, tmp_path, capsys):
    """B15: of π = a TV is 1 - satisfaction and KL(p‖π) the mean of -log Z_c, on the prompts whose Z
    is known."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "figures.json"
    prompts.write_text("".join(f"w2 w3 {word}\n" for word in WORDS))
    other = tmp_path / "training.txt"
    other.write_text("".join(f"w1 {word}\n" for word in WORDS))
    task = (
        "conditional",
        "--prompts",
        other,
        "--unseen-prompts",
        prompts,
        "--prompts-per-step",
        4,
        *SMALL,
    )
    arguments = (
        *task,
        "--eval-samples",
        64,
        "--predicate",
        "tests.experiments.test_conditional:thrice",
    )
    assert (
        run(
            monkeypatch,
            evaluate.Config,
            evaluate.main,
            "--aligned",
            TINY,
            "--output",
            output,
            *arguments,
        )
        == 0
    )
    found = {
        name: figure["value"] for name, figure in json.loads(output.read_text())["figures"].items()
    }
    errors = {
        name: figure["std_error"]
        for name, figure in json.loads(output.read_text())["figures"].items()
    }
    # 4 standard errors, of the one and of the other figure.
    least = 4 * np.hypot(errors["total_variation"], errors["satisfaction"])
    assert abs(found["total_variation"] - (1 - found["satisfaction"])) < min(least, 0.1)
    assert abs(found["forward_kl"] + found["log_z"]) < 0.1 * found["forward_kl"]
    assert 0 < found["known"] < 1
    assert "Check KL(p‖π) ≥ -log E_π[b]" in capsys.readouterr().out


def test_what_is_no_model_of_this_base_is_said(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, evaluate.Config, evaluate.main, "--aligned", tmp_path, *LEXICAL) == 2
    assert "Cannot load" in capsys.readouterr().err
    model = fjax.from_pretrained(TINY)
    other = dataclasses.replace(model.config, n_layer=1)
    params = {name: leaf for name, leaf in model.params.items() if name != "h_1"}
    fjax.save_pretrained(tmp_path / "other", params, other, model.tokenizer)
    assert (
        run(monkeypatch, evaluate.Config, evaluate.main, "--aligned", tmp_path / "other", *LEXICAL)
        == 2
    )
    assert "differ in shape or tokenizer" in " ".join(capsys.readouterr().err.split())


def test_a_run_can_begin_at_another_model(monkeypatch, tmp_path, capsys):
    """Its step 0 is that model, and what that is measured against is the base model."""
    model, rng = fjax.from_pretrained(TINY), np.random.default_rng(0)
    shaken = jax.tree.map(
        lambda leaf: leaf + 0.3 * leaf.std() * rng.normal(size=leaf.shape).astype(leaf.dtype),
        model.params,
    )
    fjax.save_pretrained(tmp_path / "shaken", shaken, model.config, model.tokenizer)
    word = ("--word", "w9", *SMALL, "--steps", 1, "--eval-samples", 512)
    assert run(monkeypatch, Config, main, *word, "--run-folder", tmp_path / "base") == 0
    assert (
        run(
            monkeypatch,
            Config,
            main,
            *word,
            "--start",
            tmp_path / "shaken",
            "--run-folder",
            tmp_path / "run",
        )
        == 0
    )
    assert f"from {tmp_path / 'shaken'}" in "".join(capsys.readouterr().out.split("\n"))
    base, begun, later = (
        read_jsonl(tmp_path / name / "metrics.jsonl")[i]
        for name, i in (("base", 0), ("run", 0), ("run", -1))
    )
    assert (base["step"], begun["step"], later["step"]) == (0, 0, 1)
    assert begun["kl_to_base"] > 20 * begun["kl_to_base_std_error"]
    # both weigh samples as those of the base model, which they must then be
    for record in (begun, later):
        error = np.hypot(base["log_z_std_error"], record["log_z_std_error"])
        assert record["log_z"] == pytest.approx(base["log_z"], abs=4 * error)
    assert run(monkeypatch, Config, main, *word, "--start", tmp_path) == 2
    assert "Cannot load" in capsys.readouterr().err


def test_a_run_can_be_followed_in_tensorboard_and_wandb(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    loggers = ("--tensorboard", "--wandb-project", "fjax-test", "--wandb-mode", "offline")
    assert (
        run(
            monkeypatch,
            Config,
            main,
            "--word",
            "w9",
            *SMALL,
            "--steps",
            2,
            *loggers,
            "--run-folder",
            folder,
        )
        == 0
    )
    assert any(
        b"evaluation/satisfaction" in path.read_bytes()
        for path in (folder / "tensorboard").iterdir()
    )
    assert list(folder.glob("wandb/offline-run-*"))
    report = (folder / "report.html").read_text()
    assert "python -m experiments.lexical_constraint --word w9" in report
    assert "data:image/png;base64" in report


def test_a_logger_that_is_not_installed_is_said_at_once(monkeypatch):
    from experiments import _loggers

    monkeypatch.setattr(_loggers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        RunError, match="--wandb-project needs wandb, which is not installed: pip install wandb"
    ):
        _loggers.check_loggers(Settings(wandb_project="x"))
    with pytest.raises(RunError, match="--tensorboard needs tensorboardX"):
        _loggers.check_loggers(Settings(tensorboard=True))


def test_a_model_that_computes_the_same_is_one_of_this_base(tmp_path):
    """Though its config.json spells the activation otherwise, writes n_inner out, and was trained
    with other dropout."""
    model = fjax.from_pretrained(TINY)
    other = dataclasses.replace(
        model.config, attn_pdrop=0.0, n_inner=64, activation_function="gelu_pytorch_tanh"
    )
    fjax.save_pretrained(tmp_path / "other", model.params, other, model.tokenizer)
    settings = Settings(model=str(TINY), max_new_tokens=4)
    assert load_aligned(settings, model, str(tmp_path / "other")).config == other
