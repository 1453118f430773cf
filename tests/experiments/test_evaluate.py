"""Any saved model against any target; and the figures that a run writes, to whatever logger is
asked for."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import fjax
from experiments.common.build import load_aligned, load_model, loggers
from experiments.common.settings import Settings
from experiments.lexical_constraint.__main__ import main
from experiments.tools.evaluate import main as evaluate
from fjax.runs import RunError
from fjax.runs.loggers import check_loggers
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run
from .test_conditional import WORDS

LEXICAL = ("lexical_constraint", "--word", "w9", *SMALL)


@pytest.mark.command
def test_the_base_model_is_no_further_from_the_target_than_itself(monkeypatch, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ("--aligned", TINY, "--output", output, *LEXICAL)
    assert run(monkeypatch, evaluate, *arguments) == 0
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
    assert run(monkeypatch, evaluate, "--aligned", TINY, *gender) == 0
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
            evaluate,
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


@pytest.fixture(scope="module")
def base():
    return fjax.from_pretrained(TINY)


def test_what_is_no_model_of_this_base_is_said(base, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, evaluate, "--aligned", tmp_path, *LEXICAL) == 2
    assert "Cannot load" in capsys.readouterr().err
    other = dataclasses.replace(base.config, n_layer=1)
    params = {name: leaf for name, leaf in base.params.items() if name != "h_1"}
    fjax.save_pretrained(tmp_path / "other", params, other, base.tokenizer)
    settings = Settings(model=str(TINY), max_new_tokens=8)
    with pytest.raises(RunError, match="differ in shape or tokenizer"):
        load_aligned(settings, load_model(settings), str(tmp_path / "other"))


def test_a_run_can_begin_at_another_model(base, lexical_run, monkeypatch, tmp_path, capsys):
    """Its step 0 is that model, and what that is measured against is the base model."""
    rng = np.random.default_rng(0)
    shaken = jax.tree.map(
        lambda leaf: leaf + 0.3 * leaf.std() * rng.normal(size=leaf.shape).astype(leaf.dtype),
        base.params,
    )
    fjax.save_pretrained(tmp_path / "shaken", shaken, base.config, base.tokenizer)
    word = ("--word", "w9", *SMALL, "--steps", 1, "--eval-samples", 512)
    begin = (*word, "--start", tmp_path / "shaken", "--run-folder", tmp_path / "run")
    assert run(monkeypatch, main, *begin) == 0
    assert f"from {tmp_path / 'shaken'}" in "".join(capsys.readouterr().out.split("\n"))
    begun, *_, later = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    of_base = read_jsonl(lexical_run.folder / "metrics.jsonl")[0]
    assert (of_base["step"], begun["step"], later["step"]) == (0, 0, 1)
    assert begun["kl_to_base"] > 20 * begun["kl_to_base_std_error"]
    # Both weigh samples as those of the base model, which they must then be.
    for record in (begun, later):
        error = np.hypot(of_base["log_z_std_error"], record["log_z_std_error"])
        assert record["log_z"] == pytest.approx(of_base["log_z"], abs=4 * error)
    settings = Settings(model=str(TINY), max_new_tokens=8)
    with pytest.raises(RunError, match="Cannot load"):
        load_aligned(settings, load_model(settings), str(tmp_path))


def test_a_run_can_be_followed_in_tensorboard_and_wandb(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    loggers = ("--tensorboard", "--wandb-project", "fjax-test", "--wandb-mode", "offline")
    assert (
        run(
            monkeypatch,
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
    monkeypatch.setattr("fjax.runs.loggers.importlib.util.find_spec", lambda package: None)
    asked = Settings(tensorboard=True, wandb_project="x", wandb_mode="offline")
    assert loggers(asked) == ["tensorboard", "wandb=x,offline"]
    for name, package in zip(loggers(asked), ("tensorboardX", "wandb"), strict=True):
        with pytest.raises(RunError, match=f"needs {package}, which is not installed: pip inst"):
            check_loggers([name])


def test_a_model_that_computes_the_same_is_one_of_this_base(base, tmp_path):
    """Though its config.json spells the activation otherwise, writes n_inner out, and was trained
    with other dropout."""
    other = dataclasses.replace(
        base.config, attn_pdrop=0.0, n_inner=64, activation_function="gelu_pytorch_tanh"
    )
    fjax.save_pretrained(tmp_path / "other", base.params, other, base.tokenizer)
    settings = Settings(model=str(TINY), max_new_tokens=4)
    assert load_aligned(settings, base, str(tmp_path / "other")).config == other
