"""The main experiment on a tiny random model: everything it writes, going on after a stop, and
every kind of bad input."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import fjax
from experiments.common.settings import Settings
from experiments.common.words import contains_any
from experiments.lexical_constraint.__main__ import main
from experiments.lexical_constraint.config import Config
from experiments.lexical_constraint.target import TASK, make_target
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, finish, run

FREQUENT = ("--word", "w9", *SMALL)  # about a third of the tiny model's samples have it


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, main, *arguments)


def error_of(capsys) -> str:
    """What was said, without the box that tyro puts around it."""
    return " ".join(word for word in capsys.readouterr().err.split() if word not in "│╭╮╰╯─")


def test_words_are_whole_words():
    texts = ["An AMAZING film", "amazingly so", "un-amazing", "it 's c++ .", ""]
    assert contains_any(["amazing"], texts).tolist() == [True, False, True, False, False]
    assert contains_any(["c++"], texts).tolist() == [False, False, False, True, False]
    assert contains_any(["'s c"], texts).tolist() == [False, False, False, True, False]


@pytest.mark.command
def test_a_run_leaves_everything_behind(lexical_run):
    folder, printed, _ = lexical_run
    names = {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluation.png",
        "training.png",
        "checkpoints",
        "model",
        "report.html",
    }
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["word"] == "w9"
    assert config["versions"]["jax"] == jax.__version__
    records = read_jsonl(folder / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert [r["step"] for r in evaluations] == [0, 2, 4]
    for name in (
        "satisfaction",
        "log_z",
        "forward_kl",
        "total_variation",
        "jensen_shannon",
        "kl_to_base",
        "entropy",
    ):
        assert np.isfinite([r[name] for r in evaluations]).all(), name
        assert np.isfinite([r[f"{name}_std_error"] for r in evaluations]).all(), name
    # some samples violate the constraint, and their p is 0
    assert evaluations[0]["reverse_kl"] == np.inf
    assert abs(evaluations[0]["kl_to_base"]) < 1e-5
    assert (folder / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert "before → after" in printed
    assert "Check KL(p‖π) ≥ -log E_π[b]" in printed
    assert "FAILS" not in printed

    aligned, base = fjax.from_pretrained(folder / "model"), fjax.from_pretrained(TINY)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), aligned.params, base.params)
    assert max(jax.tree.leaves(moved)) > 0
    assert aligned.tokenizer.decode([9]) == base.tokenizer.decode([9])


def states(folder: Path, step: int) -> list[np.ndarray]:
    """The aligned parameters, which depend on every step before."""
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == step
    return jax.tree.leaves(fjax.from_pretrained(folder / "model").params)


def test_a_resumed_run_equals_one_that_was_never_stopped(experiment, lexical_run, tmp_path):
    whole, parts = lexical_run.folder, tmp_path / "parts"
    assert experiment(*lexical_run.arguments, "--steps", 2, "--run-folder", parts) == 0
    assert experiment(*lexical_run.arguments, "--steps", 4, "--run-folder", parts, "--resume") == 0
    for a, b in zip(states(whole, 4), states(parts, 4), strict=True):
        np.testing.assert_array_equal(a, b)

    def figures(folder):
        records = read_jsonl(folder / "metrics.jsonl")
        return [
            {k: v for k, v in r.items() if k != "seconds"} for r in records if r["kind"] == "step"
        ]

    assert figures(whole) == figures(parts)


def signal_after_a_step(metrics: Path, number: int) -> None:
    """For this process, as soon as a step is written down."""

    def wait():
        deadline = time.monotonic() + 300
        while not (metrics.exists() and b'"kind": "step"' in metrics.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_resume_goes_on(number, experiment, tmp_path, capsys):
    """As a process of its own hears it: tests/runs/test_endings.py."""
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    arguments = (*FREQUENT, "--eval-every", 100_000, "--run-folder", folder)
    signal_after_a_step(metrics, number)
    assert experiment(*arguments, "--steps", 100_000) == 128 + number
    assert "--resume --run-folder" in " ".join(capsys.readouterr().out.split())
    done = read_jsonl(metrics)[-1]["step"]
    assert str(done) in os.listdir(folder / "checkpoints")
    assert experiment(*arguments, "--steps", done + 1, "--resume") == 0
    assert [r["step"] for r in read_jsonl(metrics) if r["kind"] == "step"] == list(
        range(1, done + 2)
    )


def test_another_configuration_is_refused(experiment, lexical_run, tmp_path, capsys):
    folder, _, arguments = lexical_run
    kept = (folder / "metrics.jsonl").read_bytes()
    there = (*arguments, "--run-folder", folder)
    assert experiment(*there, "--steps", 1) == 2
    assert "is not empty. Give resume=True (--resume)" in error_of(capsys)
    assert experiment(*there, "--steps", 5, "--seed", 7, "--resume") == 2
    assert "another configuration (seed: 0 there, 7 now)" in error_of(capsys)
    assert (folder / "metrics.jsonl").read_bytes() == kept
    assert experiment(*arguments, "--run-folder", tmp_path / "nothing", "--resume") == 2
    assert "holds no run to resume" in error_of(capsys)


def old(folder: Path, divergence: str) -> None:
    """Leaves config.json as fjax wrote it before α was a part of the name."""
    config = json.loads((folder / "config.json").read_text()) | {"divergence": divergence}
    (folder / "config.json").write_text(json.dumps(config | {"alpha": 0.5}, indent=2))


def test_a_run_of_an_older_fjax_goes_on_or_is_refused(experiment, lexical_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(lexical_run.folder, folder)
    old(folder, "alpha")
    again = (*lexical_run.arguments, "--run-folder", folder, "--resume", "--steps", 5)
    assert experiment(*again, "--divergence", "alpha=0.5") == 2
    assert "(divergence: 'alpha' there, 'alpha=0.5' now)" in error_of(capsys)
    old(folder, "jensen_shannon")
    assert experiment(*again) == 0
    steps = [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def absent_run(tmp_path_factory):
    """Seven steps towards a word that the model does not have, with little patience."""
    folder = tmp_path_factory.mktemp("absent") / "run"
    arguments = ("--word", "nowhere", *SMALL, "--steps", 7, "--patience", 1)
    return folder, finish(main, *arguments, "--run-folder", folder)


def test_a_word_that_never_occurs(absent_run, experiment, tmp_path, capsys):
    folder, printed = absent_run
    assert "None of 32 samples of the base model satisfies the constraint" in printed
    assert "its rate is below 0.094, and log Z below -2.4" in printed
    assert "nothing to check" in printed
    records = read_jsonl(folder / "metrics.jsonl")
    assert [r["log_z"] for r in records] == [-np.inf] * (7 + 5)
    aligned, base = fjax.from_pretrained(folder / "model"), fjax.from_pretrained(TINY)
    jax.tree.map(np.testing.assert_array_equal, aligned.params, base.params)
    absent = ("--word", "nowhere", *SMALL, "--steps", 2, "--when-absent", "stop")
    assert experiment(*absent, "--run-folder", tmp_path / "stop") == 2
    assert "satisfies the constraint" in error_of(capsys)


def test_evaluations_without_a_z_do_not_count(absent_run):
    """B17: three of them ended a run by --patience, as if they were the best so far."""
    folder, printed = absent_run
    assert "--patience" not in printed
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 7


def test_a_gradient_that_is_not_finite_is_saved_and_named(experiment, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        experiment(*FREQUENT, "--divergence", "reverse_kl", "--steps", 3, "--run-folder", folder)
        == 2
    )
    message = error_of(capsys)
    assert "The gradient of step 1 was not finite" in message
    assert "--clip -8 8" in message
    assert os.listdir(folder / "checkpoints") == ["1"]


SMALL_SETTINGS = {"model": str(TINY), "samples": 16, "max_new_tokens": 8}


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({}, {"model": "./nowhere"}, "Cannot load --model ./nowhere: There is no folder"),
        (
            {},
            {"max_new_tokens": 24},
            "has 24 positions, but the start token and --max-new-tokens 24 need 25",
        ),
        ({}, {"divergence": "kl"}, "--divergence: There is no divergence 'kl'. There are "),
        ({}, {"divergence": "alpha"}, "--divergence: 'alpha' lacks its parameter"),
        ({}, {"samples": 1}, "--samples must be at least 2"),
        ({"word": " "}, {}, "--word must not be empty"),
        ({"smoothing": 1.0}, {}, "--smoothing must be at least 0 and at most 0.999"),
        ({}, {"base_fraction": 1.0}, "--base-fraction must be at least 0 and at most 0.9"),
        ({}, {"learning_rate": 0.0}, "--learning-rate must be at least 1e-12"),
    ],
)
def test_bad_input_is_named_before_any_work(options, settings, message):
    with pytest.raises((ValueError, RunError)) as error:
        build(TASK, Config(**options, settings=Settings(**SMALL_SETTINGS | settings)))
    assert message in str(error.value)


def test_the_command_says_it_in_a_sentence_and_begins_nothing(experiment, tmp_path, capsys):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for arguments, message in (
        (("--model", tmp_path / "bert"), "bert"),
        (("--divergence", "kl"), "There is no divergence 'kl'. There are forward_kl"),
        (("--run-folder", "/proc/nowhere"), "Cannot write to the run folder /proc/nowhere"),
        (("--samples", 1.5), "--samples"),
    ):
        assert experiment(*FREQUENT, "--run-folder", tmp_path / "run", *arguments) == 2
        shown = error_of(capsys)
        assert message in shown
        assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_is_refused_before_training(experiment, tmp_path, capsys, monkeypatch):
    full = lambda _: type("Usage", (), {"free": 2**20})  # noqa: E731
    monkeypatch.setattr("fjax.runs.folder.shutil.disk_usage", full)
    assert experiment(*FREQUENT, "--run-folder", tmp_path / "run") == 2
    assert "has 1 MiB left" in error_of(capsys)


def test_help_teaches(experiment, capsys):
    assert experiment("--help") == 0
    printed = capsys.readouterr().out
    assert "python -m experiments.lexical_constraint --word amazing" in printed
    assert "Whole words count" in printed


def test_it_stops_when_near_enough_and_exports_the_nearest(experiment, tmp_path, capsys):
    """Any divergence is below 100; and after evaluations that cannot improve on the first, patience
    ends the run."""
    folder = tmp_path / "near"
    assert experiment(*FREQUENT, "--steps", 50, "--stop-below", 100, "--run-folder", folder) == 0
    assert "below 100 (--stop-below)" in " ".join(capsys.readouterr().out.split())
    assert read_jsonl(folder / "metrics.jsonl")[-1]["step"] == 2
    folder = tmp_path / "patient"
    arguments = (
        *FREQUENT,
        "--steps",
        50,
        "--patience",
        1,
        "--learning-rate",
        0.3,
        "--run-folder",
        folder,
    )
    assert experiment(*arguments) == 0
    evaluated = {
        r["step"]: r["jensen_shannon"]
        for r in read_jsonl(folder / "metrics.jsonl")
        if r["kind"] == "evaluation"
    }
    best = min((step for step in evaluated if step), key=evaluated.__getitem__)
    last = max(evaluated)
    assert evaluated[best] < evaluated[last]
    assert last == best + 2
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "No lower JS(π, p) in the last 1 evaluations, with a patience of 1 (--patience): done"
        in printed
    )
    assert f"The model is that of step {best}, where JS(π, p) was lowest" in printed
    assert str(best) in os.listdir(folder / "checkpoints")


@pytest.mark.parametrize(
    ("smoothing", "said"),
    [(0.0, "p(x) ∝ a(x)·[great in x]"), (0.1, "p(x) ∝ a(x)·([great in x] + 0.1)")],
)
def test_the_target_in_words(smoothing, said):
    target = make_target(Config(word=" great", smoothing=smoothing))
    assert target.description == said
    assert re.findall(target.highlight, "a Great film , the greatest") == ["Great"]
