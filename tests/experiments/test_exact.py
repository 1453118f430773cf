"""Exact samples on the command line: drawn once for a target, whatever the run; and where there are
none."""

import json

import numpy as np
import pytest

from experiments.gender_balance.config import Config as Gender
from experiments.gender_balance.target import highest
from experiments.lexical_constraint.__main__ import main
from experiments.sentiment_reward.config import Config as Sentiment
from experiments.tools.evaluate import main as evaluate
from fjax.runs import read_metrics

from .commands import SMALL, finish, run

ASKED = ("--exact-samples", 40, "--exact-draws", 400)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run towards w9 that draws them."""
    folder = tmp_path_factory.mktemp("exact")
    more = *ASKED, "--exact-folder", folder / "kept"
    printed = finish(
        main, "--word", "w9", *SMALL, *more, "--steps", 2, "--run-folder", folder / "run"
    )
    (kept,) = (folder / "kept").iterdir()
    return folder, more, printed, kept


def target_of(folder) -> dict:
    (record,) = (r for r in read_metrics(folder) if r["kind"] == "target")
    return {k: v for k, v in record.items() if k != "seconds"}


def test_they_are_drawn_once_for_runs_of_other_seeds_rates_and_objectives(first, monkeypatch):
    folder, more, printed, kept = first
    assert f"kept in {kept}" in printed
    before = kept.read_bytes(), kept.stat().st_mtime_ns
    arguments = "--seed", 1, "--learning-rate", 1e-3, "--divergence", "forward_kl", "--steps", 2
    finish(main, "--word", "w9", *SMALL, *more, *arguments, "--run-folder", folder / "other")
    assert (kept.read_bytes(), kept.stat().st_mtime_ns) == before
    assert target_of(folder / "other") == target_of(folder / "run")
    assert target_of(folder / "run")["satisfaction"] == 1


def test_another_word_has_others(first):
    folder, more, _, kept = first
    finish(main, "--word", "w8", *SMALL, *more, "--steps", 1, "--run-folder", folder / "w8")
    assert len(list(kept.parent.iterdir())) == 2


def test_a_damaged_file_is_named(first, monkeypatch, capsys, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / first[-1].name).write_bytes(b"")
    changed = *SMALL, *ASKED, "--exact-folder", tmp_path / "kept", "--run-folder", tmp_path / "run"
    assert run(monkeypatch, main, "--word", "w9", *changed) == 2
    assert ".npz is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_too_few_are_said_and_done_without(tmp_path):
    more = "--exact-samples", 40, "--exact-draws", 16, "--exact-folder", tmp_path / "kept"
    printed = finish(
        main, "--word", "w9", *SMALL, *more, "--steps", 1, "--run-folder", tmp_path / "run"
    )
    assert "exact samples of p, fewer than 30" in printed
    assert {r["kind"] for r in read_metrics(tmp_path / "run")} == {"step", "evaluation"}


def test_evaluate_has_them_too(first, tmp_path):
    folder, more, *_ = first
    given = "--aligned", folder / "run" / "model", "--output", tmp_path / "figures.json"
    finish(evaluate, *given, "lexical_constraint", "--word", "w9", *SMALL, *more)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figures["exact_samples"]["value"] == target_of(folder / "run")["exact_samples"]
    assert figures["log_z"]["value"] == target_of(folder / "run")["log_z"]


def test_the_bound_of_fitted_moments_is_one():
    """Over all values that two Boolean words and one more can have."""
    config, coefficients = Gender(share=0.3), np.array([-2.0, 1.5, -0.5, np.inf])
    balances = np.array([0.0, 1 - 0.3, -0.3])
    values = [
        -2.0 * balance + 1.5 * x - 0.5 * y for balance in balances for x in (0, 1) for y in (0, 1)
    ]
    assert highest(config, coefficients) == pytest.approx(max(values))


def test_bad_input(monkeypatch, capsys):
    for flag in ("--exact-samples", "--exact-draws"):
        assert run(monkeypatch, main, *SMALL, flag, 0) == 2
        assert f"{flag} must be at least 1" in capsys.readouterr().err
    assert Sentiment(reward_max=3.0).reward_max == 3.0
