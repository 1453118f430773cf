"""Other ways to take a step, as the command line asks for them: what reaches the library, and what does not go
together."""

import numpy as np
import pytest

from experiments.common import build
from experiments.common.settings import Settings
from experiments.lexical_constraint.__main__ import main
from fjax.runs import read_metrics
from fjax.runs.loop import Result

from .commands import SMALL, run

FREQUENT = ("--word", "w9", *SMALL)
FILTER = {"algorithm": "filter_sft", "divergence": "forward_kl"}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What a command line makes of the library's functions, without a run."""
    found = {}

    def align(model, target, tuner, collector, **options):
        found.update(options, model=model, tuner=tuner, collector=collector)
        return Result(0, 0, {}, tmp_path, params=None)

    monkeypatch.setattr(build, "align", align)
    for name in ("ppo_tuner", "rloo_tuner"):
        make = lambda *_, name=name, **options: (name, options)  # noqa: E731
        monkeypatch.setattr(build, name, make)

    def ask(*arguments):
        assert run(monkeypatch, main, *FREQUENT, *arguments, "--run-folder", tmp_path / "run") == 0
        return found

    return ask


def test_a_command_line_is_what_align_is_given(asked):
    found = asked(
        *("--proposal", "adaptive", "--proposal-every", 7, "--divergence", "alpha=0.3"),
        *("--steps", 9, "--checkpoint-every", 4, "--stop-below", 0.5, "--patience", 3),
        *("--seed", 5, "--tensorboard", "--base-fraction", 0.25),
    )
    expected = {
        "proposal_every": 7, "overlap": False, "objective": "alpha=0.3", "steps": 9, "eval_every": 2,
        "eval_samples": 32, "checkpoint_every": 4, "stop_below": 0.5, "patience": 3, "seed": 5,
        "loggers": ["tensorboard"], "title": "w9-alpha-0.3",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["initial"] is found["policy_of"](found["initial"]) is found["model"].params
    assert list(found["divergences"]) == [*build.REPORTED, "alpha=0.3"]
    assert (found["collector"].samples, found["collector"].policy_samples) == (16, 12)


def test_overlap_is_asked_for_by_its_flag(asked):
    found = asked("--overlap", "--proposal-every", 7)
    assert found["overlap"]
    assert found["proposal_every"] is None  # of an adaptive proposal, which this is not


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_the_usual_algorithms_have_samples_of_the_policy_alone(asked, algorithm):
    found = asked("--algorithm", algorithm, "--divergence", "reverse_kl")
    name, options = found["tuner"]
    assert name == f"{algorithm}_tuner"
    assert found["collector"].policy_samples == 16
    assert {k: options[k] for k in options.keys() & {"epochs", "minibatches"}} == (
        {"epochs": 2, "minibatches": 4} if algorithm == "ppo" else {}
    )


def test_filtering_draws_from_the_base_alone_as_much_as_a_run_would(asked):
    found = asked("--algorithm", "filter_sft", "--divergence", "forward_kl", "--steps", 7)
    assert found["collector"].policy_samples == found["collector"].samples == 16
    assert found["steps"] == found["tuner"].steps == 7 + 2  # 7 updates are two steps
    (stage,) = Settings(algorithm="filter_sft", divergence="forward_kl", steps=7).schedule
    assert (stage.samples, stage.updates, stage.patience) == (7 * 256, 7, 3)


def test_or_as_its_one_stage_says(asked):
    filtering = "--algorithm", "filter_sft", "--divergence", "forward_kl"
    found = asked(*filtering, "--stages", "forward_kl:40:12")
    assert found["steps"] == found["tuner"].steps == 3 + 3


def test_steps_of_stages_are_their_own(asked):
    found = asked("--stages", "forward_kl:40:12", "jensen_shannon:16:1", "--steps", 99)
    assert found["steps"] == found["tuner"].steps == 3 + 3 + 1 + 1


def test_a_run_that_filters(monkeypatch, tmp_path):
    """All of its samples are the base's, drawn before the first update; that it helps is shown in
    tests/runs/test_stages.py."""
    filtering = "--algorithm", "filter_sft", "--divergence", "forward_kl", "--lora-rank", 2
    stages = "--stages", "forward_kl:320:20", "--learning-rate", 0.01, "--eval-every", 99
    folder = tmp_path / "run"
    assert run(monkeypatch, main, *FREQUENT, *filtering, *stages, "--run-folder", folder) == 0
    metrics = read_metrics(folder)
    evaluations = [r for r in metrics if r["kind"] == "evaluation"]
    assert [r["samples"] for r in (evaluations[0], evaluations[-1])] == [0, 320]
    seen = [r["held_out"] for r in metrics if "held_out" in r]
    assert len(seen) >= 2
    assert np.isfinite(seen).all()


def test_a_run_of_many_of_them_at_once(monkeypatch, tmp_path):
    ways = "--overlap", "--divergence", "alpha=0.3", "--optimizer", "sgd", "--decay"
    arguments = *FREQUENT, *ways, "--trainable", "wte|bias", "--steps", 2
    assert run(monkeypatch, main, *arguments, "--run-folder", tmp_path / "run") == 0
    evaluation = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "evaluation"][-1]
    assert np.isfinite(evaluation["self_bleu"])
    assert evaluation["perplexity"] > 1
    assert np.isfinite(evaluation["alpha=0.3"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            {"algorithm": "ppo"},
            "--algorithm ppo minimises reverse KL: give --divergence reverse_kl",
        ),
        (
            {"algorithm": "rloo", "divergence": "reverse_kl", "overlap": True},
            "--overlap is for --algorithm fdpg",
        ),
        (
            {"algorithm": "rloo", "divergence": "reverse_kl", "clip": (-8.0, 8.0)},
            "--clip is for --algorithm fdpg",
        ),
        (
            {"algorithm": "ppo", "divergence": "reverse_kl", "proposal": "adaptive"},
            "--proposal adaptive is for --algorithm fdpg",
        ),
        (
            {"algorithm": "ppo", "divergence": "reverse_kl", "stages": ("forward_kl:64:5",)},
            "--stages is for --algorithm fdpg; ppo needs the policy's own samples",
        ),
        (
            {"algorithm": "filter_sft"},
            "--algorithm filter_sft minimises forward KL: give --divergence forward_kl",
        ),
        (
            FILTER | {"start": "a model"},
            "--algorithm filter_sft draws from the base model and begins as it: leave --start out",
        ),
        (
            FILTER | {"clip": (-8.0, 8.0)},
            "--clip is for --algorithm fdpg; filter_sft draws once, from the base model",
        ),
        (
            FILTER | {"stages": ("forward_kl:64:5", "forward_kl:64:5")},
            "or give one, forward_kl:SAMPLES:UPDATES; got forward_kl:64:5 forward_kl:64:5",
        ),
        (FILTER | {"stages": ("jensen_shannon:64:5",)}, "got jensen_shannon:64:5"),
        (
            FILTER | {"stages": ("forward_kl:0:5",)},
            "the first, 'forward_kl:0:5', must draw samples",
        ),
        (
            {"stages": ("forward_kl:64:5",), "overlap": True},
            "--stages say what is drawn from and when: leave out --overlap",
        ),
        (
            {"stages": ("forward_kl:64:5",), "proposal": "adaptive"},
            "leave out --proposal adaptive",
        ),
        (
            {"overlap": True, "proposal": "adaptive"},
            "--overlap and --proposal adaptive cannot be combined",
        ),
        ({"proposal_every": 0}, "--proposal-every must be at least 1"),
        ({"divergence": "alpha=nan"}, "--divergence: 'alpha=nan': 'nan' is no finite number"),
        ({"divergence": "forward_lk"}, "--divergence: There is no divergence 'forward_lk'"),
    ],
)
def test_what_does_not_go_together_is_said(chosen, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared as a whole below
        Settings(**chosen)
    assert message in str(error.value)


def test_and_ends_the_command_with_status_2(monkeypatch, capsys):
    assert run(monkeypatch, main, *FREQUENT, "--overlap", "--proposal", "adaptive") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--overlap and --proposal adaptive cannot be combined" in said
