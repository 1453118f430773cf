"""Offline alignment on the tiny model: every loss takes steps, a resumed run repeats none, and what
cannot be is said."""

import json

import numpy as np
import pytest

from experiments.preference_pairs.config import BUILT_IN, Config
from experiments.preference_pairs.data import read_pairs
from experiments.preference_pairs.run import main
from fjax.training import read_jsonl

from .commands import SMALL, run

HERE = "tests.experiments.test_preference_pairs"


def likes_w9(texts):
    """One number a text: how often it says w9."""
    return [float(text.split().count("w9")) for text in texts]


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    pairs, unseen = tmp_path / "pairs.jsonl", tmp_path / "unseen.txt"
    lines = [
        {"prompt": f"w{i}", "chosen": " w9 w9", "rejected": f" w{i + 1} w4"} for i in range(20, 36)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    unseen.write_text("".join(f"w{i}\n" for i in range(10, 18)))
    given = (
        "--pairs",
        pairs,
        "--unseen-prompts",
        unseen,
        "--prompts-per-batch",
        4,
        "--pairs-per-step",
        4,
    )

    def call(*arguments):
        return run(
            monkeypatch, Config, main, *given, *SMALL, "--reward", f"{HERE}:likes_w9", *arguments
        )

    return call


@pytest.mark.parametrize("loss", ["dpo", "f_dpo", "chi_po", "ipo", "exo"])
def test_every_loss_learns_the_pairs(loss, experiment, tmp_path):
    folder = tmp_path / "run"
    rate = 1e-3 if loss == "ipo" else 3e-3
    more = ("--learning-rate", rate, "--eval-every", 100, "--warmup-steps", 1)
    assert experiment("--loss", loss, "--steps", 12, "--run-folder", folder, *more) == 0
    records = read_jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["epoch"] for r in steps] == [i / 4 for i in range(1, 13)]
    assert steps[-1]["samples"] == 48
    assert steps[-1]["margin"] > steps[0]["margin"] + 0.1
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert 0 <= evaluations[-1]["win_rate"] <= 1
    # The base model against itself: half, within four standard errors.
    assert abs(evaluations[0]["win_rate"] - 0.5) <= 4 * evaluations[0]["win_rate_std_error"]
    assert evaluations[-1]["kl_to_base"] > 0
    assert (folder / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_a_resumed_run_equals_one_that_was_never_stopped(experiment, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert experiment("--steps", 6, "--run-folder", whole) == 0
    assert experiment("--steps", 3, "--run-folder", parts) == 0
    assert experiment("--steps", 6, "--run-folder", parts, "--resume") == 0

    def figures(folder):
        return [
            {k: v for k, v in r.items() if k != "seconds"}
            for r in read_jsonl(folder / "metrics.jsonl")
            if r["kind"] == "step"
        ]

    assert figures(whole) == figures(parts)


def test_the_built_in_pairs_are_whole():
    pairs, reports = read_pairs(BUILT_IN, skip_bad=False)
    assert not reports
    assert len(pairs) > 2000
    assert all(pair.chosen != pair.rejected for pair in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beta", 0), "--beta must be at least 1e-06"),
        (("--reward-beta", -1), "--reward-beta must be at least 1e-06"),
        (("--pairs", "/nowhere.jsonl"), "Cannot read the pairs /nowhere.jsonl"),
        (("--pairs-per-step", 17), "There are 16 pairs to be used, fewer than the 17 of a step"),
        (("--algorithm", "rloo", "--divergence", "reverse_kl"), "steps on pairs draw none"),
    ],
)
def test_bad_input_is_named_before_any_step(experiment, tmp_path, capsys, arguments, message):
    assert experiment("--steps", 2, "--run-folder", tmp_path / "run", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_bad_line_stops_or_is_left_out(experiment, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    good = [
        json.dumps({"prompt": f"w{i}", "chosen": " w9", "rejected": " w4"}) for i in range(20, 24)
    ]
    bad.write_text("\n".join([*good, '{"prompt": "w1", "chosen": " w9"}']) + "\n")
    arguments = ("--pairs", bad, "--steps", 1, "--run-folder", tmp_path / "run")
    assert experiment(*arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert 'line 5 has no "rejected"' in said
    assert "--skip-bad-lines" in said
    assert experiment(*arguments, "--skip-bad-lines") == 0
    assert "1 of 5 lines left out" in " ".join(capsys.readouterr().out.split())


def test_prompts_of_pairs_are_not_evaluated_on(experiment, tmp_path, capsys):
    seen = tmp_path / "seen.txt"
    seen.write_text("w20\nw10\nw11\nw12\n")
    assert experiment("--steps", 1, "--unseen-prompts", seen) == 2
    assert "1 prompts to evaluate on are in" in " ".join(capsys.readouterr().err.split())


def test_spaces_around_a_prompt_hide_nothing(experiment, tmp_path, capsys):
    """A prompt to evaluate on has none; one of a pair may, and is the same prompt."""
    pairs, seen = tmp_path / "spaces.jsonl", tmp_path / "seen.txt"
    lines = [{"prompt": f" w{i} ", "chosen": " w9", "rejected": " w4"} for i in range(20, 24)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen.write_text("w20\nw10\nw11\nw12\n")
    assert experiment("--steps", 1, "--pairs", pairs, "--unseen-prompts", seen) == 2
    assert "1 prompts to evaluate on are in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"prompt": "w1", "chosen": "\xff"}', "line 2 is not UTF-8 text"),
        (b'{"prompt": "w1", "prompt": "w2"}', 'line 2 has "prompt" twice'),
        (
            b'{"prompt": "w1", "chosen": "w2", "rejected": "film"}',
            "reads a part of 'film' as its end token",
        ),
    ],
)
def test_whatever_a_line_has_is_one_sentence(experiment, tmp_path, capsys, content, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\r\n' + content + b"\r\n")
    assert (
        experiment(
            "--pairs", bad, "--pairs-per-step", 1, "--steps", 1, "--run-folder", tmp_path / "run"
        )
        == 2
    )
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "Traceback" not in said


def test_the_win_rate_is_that_of_pairs_of_samples():
    from experiments._evaluate import _win_rate

    mine, other = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[2.0, 0.0], [2.0, 1.0]])
    figure = _win_rate(mine, other)
    # 1>0, 3>2, 3>0; and two ties, two wins
    assert figure.value == pytest.approx((3 / 4 + 3 / 4) / 2)
    single = _win_rate(mine[:1], other[:1])
    assert single.value == 0.75
