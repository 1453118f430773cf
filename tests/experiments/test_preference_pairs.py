"""Offline alignment on the tiny model: every loss takes steps, a resumed run repeats none, and what
cannot be is said."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fjax
from experiments.common.settings import Settings
from experiments.preference_pairs.__main__ import main
from experiments.preference_pairs.config import BUILT_IN, Config
from experiments.preference_pairs.data import read_pairs
from experiments.preference_pairs.target import TASK, make_loss, make_stepper
from fjax import preferences
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, finish, run

HERE = "tests.experiments.test_preference_pairs"
PAIRS = [
    {"prompt": f"w{i}", "chosen": " w9 w9", "rejected": f" w{i + 1} w4"} for i in range(20, 36)
]


def likes_w9(texts):
    """One number a text: how often it says w9."""
    return [float(text.split().count("w9")) for text in texts]


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs, and prompts to evaluate on."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text(lines(*PAIRS))
    (folder / "unseen.txt").write_text("".join(f"w{i}\n" for i in range(10, 18)))
    return folder / "pairs.jsonl", folder / "unseen.txt"


def configured(files, settings=None, **options) -> Config:
    pairs, unseen = files
    small = {"model": str(TINY), "samples": 16, "max_new_tokens": 8, "divergence": "reverse_kl"}
    given = {"pairs": pairs, "unseen_prompts": unseen, "reward": f"{HERE}:likes_w9"}
    sizes = {"prompts_per_batch": 4, "pairs_per_step": 4}
    return Config(**given | sizes | options, settings=Settings(**small | (settings or {})))


@pytest.fixture(scope="module")
def arguments(files):
    pairs, unseen = files
    sizes = ("--prompts-per-batch", 4, "--pairs-per-step", 4, *SMALL)
    return ("--pairs", pairs, "--unseen-prompts", unseen, "--reward", f"{HERE}:likes_w9", *sizes)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("dpo", preferences.dpo),
        ("f_dpo", partial(preferences.f_dpo, divergence=fjax.forward_kl())),
        ("chi_po", preferences.chi_po),
        ("ipo", preferences.ipo),
        ("exo", preferences.exo_pair),
    ],
)
def test_a_loss_is_that_of_its_name(name, loss, files):
    """That a step descends each of them: tests/training/test_preference.py."""
    given = [jnp.array([x, 2 * x]) for x in (-1.0, -3.0, -2.5, -1.5)]
    found = make_loss(configured(files, loss=name, f="forward_kl", beta=0.3))(*given)
    np.testing.assert_array_equal(found, loss(*given, beta=0.3))


@pytest.fixture(scope="module")
def built(files):
    return build(TASK, configured(files))


@pytest.mark.command
def test_a_run_evaluates_on_prompts_that_no_pair_has(arguments, tmp_path):
    folder = tmp_path / "run"
    finish(main, *arguments, "--steps", 3, "--learning-rate", 3e-3, "--run-folder", folder)
    records = read_jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [(r["epoch"], r["samples"]) for r in steps] == [(0.25, 4), (0.5, 8), (0.75, 12)]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert 0 <= evaluations[-1]["win_rate"] <= 1
    # The base model against itself: half, within four standard errors.
    assert abs(evaluations[0]["win_rate"] - 0.5) <= 4 * evaluations[0]["win_rate_std_error"]
    assert evaluations[-1]["kl_to_base"] > 0
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_learn_the_pairs_and_go_on_as_if_they_had_never_stopped(built, files):
    """That the loop restores what `Progress` has: tests/runs/test_steps.py."""
    config = configured(files, {"learning_rate": 3e-3, "warmup_steps": 1})
    built = built._replace(settings=config.settings)

    def steps(progress, numbers):
        stepper, figures = make_stepper(config, built), []
        progress = stepper.begin(built.model.params) if progress is None else progress
        stepper.go_on(progress)
        for number in numbers:
            progress, found = stepper.step(progress, number)
            figures.append(found)
        return progress, figures

    whole, expected = steps(None, range(12))
    assert expected[-1]["margin"] > expected[0]["margin"] + 0.1
    assert [figures["epoch"] for figures in expected] == [step / 4 for step in range(1, 13)]
    parts, first = steps(None, range(5))
    parts, then = steps(parts, range(5, 12))
    assert first + then == expected
    jax.tree.map(np.testing.assert_array_equal, parts.state.params, whole.state.params)


def test_the_built_in_pairs_are_whole():
    pairs, reports = read_pairs(BUILT_IN, skip_bad=False)
    assert not reports
    assert len(pairs) > 2000
    assert all(pair.chosen != pair.rejected for pair in pairs)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"beta": 0.0}, {}, "--beta must be at least 1e-06"),
        ({"reward_beta": -1.0}, {}, "--reward-beta must be at least 1e-06"),
        ({"pairs": Path("/nowhere.jsonl")}, {}, "Cannot read the pairs /nowhere.jsonl"),
        (
            {"pairs_per_step": 17},
            {},
            "There are 16 pairs to be used, fewer than the 17 of a step",
        ),
        ({}, {"algorithm": "rloo"}, "steps on pairs draw none"),
    ],
)
def test_bad_input_is_named_before_any_step(files, options, settings, message):
    with pytest.raises((ValueError, RunError)) as error:
        build(TASK, configured(files, settings, **options))
    assert message in str(error.value)


def test_a_bad_line_stops_or_is_left_out(files, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(lines(*PAIRS[:4], {"prompt": "w1", "chosen": " w9"}))
    with pytest.raises(RunError, match=r'line 5 has no "rejected".*--skip-bad-lines'):
        build(TASK, configured(files, pairs=bad))
    build(TASK, configured(files, pairs=bad, skip_bad_lines=True))
    assert "1 of 5 lines left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("spaces", ["", " "])
def test_prompts_of_pairs_are_not_evaluated_on(files, tmp_path, spaces):
    """A prompt to evaluate on has no spaces around it; one of a pair may, and is the same one."""
    pairs, seen = tmp_path / "spaces.jsonl", tmp_path / "seen.txt"
    pairs.write_text(lines(*(p | {"prompt": f"{spaces}{p['prompt']}{spaces}"} for p in PAIRS)))
    seen.write_text("w20\nw10\nw11\nw12\n")
    with pytest.raises(RunError, match="1 prompts to evaluate on are in"):
        build(TASK, configured(files, pairs=pairs, unseen_prompts=seen))


def test_the_command_says_it_in_a_sentence(arguments, monkeypatch, tmp_path, capsys):
    """Whatever a line has; all that one may have: test_preference_data.py."""
    bad = tmp_path / "bad.jsonl"
    good = b'{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\r\n'
    bad.write_bytes(good + b"[" * 100_000 + b"\r\n")
    folder = tmp_path / "run"
    assert run(monkeypatch, main, *arguments, "--pairs", bad, "--run-folder", folder) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "line 2 is nested too deeply" in said
    assert "Traceback" not in said
    assert not folder.exists()


def test_steps_on_pairs_train_adapters_too(files):
    built = build(TASK, config := configured(files, {"lora_rank": 1, "trainable": "attn"}))
    stepper = make_stepper(config, built)
    progress, figures = stepper.step(stepper.begin(built.trained.initial), 0)
    assert figures["finite"]
    assert len(progress.state.params) == 4  # of two blocks, two matrices each
    assert all(adapter["up"].any() for adapter in progress.state.params.values())
