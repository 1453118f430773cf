"""Other ways to take a step: a proposal that adapts, a batch drawn ahead, RLOO and PPO; all of them
resumed exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _steps
from experiments._evaluate import Target
from experiments._programs import load_model, make_programs
from experiments._settings import Settings
from experiments.lexical_constraint.config import Config
from experiments.lexical_constraint.run import main
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run

FREQUENT = ("--word", "w9", *SMALL)


def figures(folder, kind="step"):
    records = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records if r["kind"] == kind]


@pytest.mark.parametrize(
    "flags",
    [
        ("--proposal", "adaptive", "--proposal-every", 2, "--divergence", "forward_kl"),
        (
            "--overlap",
            "--divergence",
            "alpha",
            "--alpha",
            0.3,
            "--optimizer",
            "sgd",
            "--decay",
            "--trainable",
            "wte|bias",
        ),
        (
            "--algorithm",
            "ppo",
            "--divergence",
            "reverse_kl",
            "--smoothing",
            0.1,
            "--learning-rate",
            1e-4,
        ),
    ],
    ids=("adaptive", "overlap", "ppo"),
)
def test_a_resumed_run_equals_one_that_was_never_stopped(flags, monkeypatch, tmp_path):
    """Stopped in the middle between two checks of the proposal."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (
        run(monkeypatch, Config, main, *FREQUENT, *flags, "--steps", 5, "--run-folder", whole) == 0
    )
    assert (
        run(monkeypatch, Config, main, *FREQUENT, *flags, "--steps", 3, "--run-folder", parts) == 0
    )
    assert (
        run(
            monkeypatch,
            Config,
            main,
            *FREQUENT,
            *flags,
            "--steps",
            5,
            "--run-folder",
            parts,
            "--resume",
        )
        == 0
    )
    assert len(figures(parts)) == 5
    assert figures(whole) == figures(parts)
    # B18: the evaluation that ended the first part was one more, by which --patience stopped
    # elsewhere.
    assert [r["step"] for r in figures(parts, "evaluation")] == [0, 2, 4, 5]
    # NaN is not itself
    assert repr(figures(whole, "evaluation")) == repr(figures(parts, "evaluation"))
    assert (whole / "samples.jsonl").read_bytes() == (parts / "samples.jsonl").read_bytes()
    evaluation = figures(whole, "evaluation")[-1]
    assert np.isfinite(evaluation["self_bleu"])
    assert evaluation["perplexity"] > 1
    assert ("alpha" in evaluation) == ("--alpha" in flags)


@pytest.fixture(scope="module")
def tiny():
    return load_model(Settings(model=str(TINY), max_new_tokens=8))


def moved(model, scale=0.3):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + scale * x.std() * rng.normal(size=x.shape).astype(x.dtype), model.params
    )


@pytest.mark.parametrize(
    "flags", [{"base_fraction": 0.25}, {"algorithm": "rloo", "divergence": "reverse_kl"}], ids=str
)
def test_log_q_is_of_the_mixture_that_the_batch_was_drawn_from(flags, tiny):
    """Of so many rows of the policy and so many of the base model, each scored anew under both."""
    programs = make_programs(Settings(model=str(TINY), samples=32, max_new_tokens=8, **flags), tiny)
    params = moved(tiny)
    batch = jax.device_get(programs.draw(params, jax.random.key(0)))
    n = batch.from_policy
    assert n == (24 if "base_fraction" in flags else 32)
    log_pi, log_a = (
        np.asarray(programs.score(p, batch.tokens, batch.where), np.float64)
        for p in (params, tiny.params)
    )
    assert abs(log_pi - log_a).max() > 0.1  # so that a wrong share would be seen
    expected = np.log(n / 32 * np.exp(log_pi) + (1 - n / 32) * np.exp(log_a))
    np.testing.assert_allclose(batch.log_q, expected, atol=2e-5)
    np.testing.assert_allclose(batch.log_pi, log_pi, atol=2e-5)
    np.testing.assert_allclose(batch.log_a, log_a, atol=2e-5)
    strata = programs.to_rollout(batch, batch.log_a).strata
    assert np.asarray(strata).tolist() == [0] * n + [1] * (32 - n)


@pytest.mark.parametrize(
    "flags",
    [{"overlap": True}, {"proposal": "adaptive"}, {}],
    ids=("overlap", "adaptive", "policy"),
)
def test_every_way_of_drawing_tells_the_update_whose_the_samples_are(flags, tiny):
    """A6: the default batch has a fixed number of either, and the leave-one-out baseline is
    unbiased only if it knows."""
    settings = Settings(model=str(TINY), samples=32, max_new_tokens=8, base_fraction=0.25, **flags)
    programs, seen = make_programs(settings, tiny), []

    def update(state, rollout):
        seen.append(rollout.strata)
        return programs.tuner.update(state, rollout)

    target = Target(lambda _, texts: {}, lambda log_a, _: np.asarray(log_a), headline="")
    watched = programs._replace(tuner=programs.tuner._replace(update=update))
    stepper = _steps.online(settings, watched, target, jax.random.key(0))
    stepper.step(stepper.begin(programs.tuner.init(tiny.params)), 0)
    assert np.asarray(seen[0]).tolist() == [0] * 24 + [1] * 8


def test_the_proposal_is_renewed_only_when_the_policy_is_nearer():
    """p is the base with a word: a policy moved towards the word gains, one moved away loses."""
    settings = Settings(model=str(TINY), samples=256, max_new_tokens=8, base_fraction=0.25)
    model = load_model(settings)
    programs = make_programs(settings, model)
    target = Target(
        lambda _, texts: {"w9": np.array(["w9" in text.split() for text in texts], np.float32)},
        lambda log_a, features: np.where(features["w9"] > 0, log_a, -np.inf),
        headline="w9",
    )
    window = [_steps.score(programs, target, programs.draw(model.params, jax.random.key(0)))[0]]
    same = _steps.proposal_gain(programs, model.params, window)
    assert abs(float(same.value)) < 1e-5
    (batch, log_score), rollout = window[0], programs.to_rollout(*window[0])
    state, _ = programs.tuner.update(programs.tuner.init(model.params), rollout)
    towards = jax.tree.map(lambda new, old: old + 10 * (new - old), state.params, model.params)
    away = jax.tree.map(lambda new, old: old - 10 * (new - old), state.params, model.params)
    assert float(_steps.proposal_gain(programs, towards, window).value) > 0
    assert float(_steps.proposal_gain(programs, away, window).value) < 0
    # By hand: self-normalised weights P/q of what was drawn, base samples included.
    weights = np.exp(np.asarray(log_score) - np.asarray(batch.log_q))
    log_pi = np.asarray(programs.score(towards, batch.tokens, batch.where))
    by_hand = np.sum(weights * (log_pi - np.asarray(batch.log_pi))) / weights.sum()
    np.testing.assert_allclose(
        _steps.proposal_gain(programs, towards, window).value, by_hand, rtol=1e-4
    )
    nothing = [_steps.Scored(batch, np.full(256, -np.inf, np.float32))]
    assert float(_steps.proposal_gain(programs, towards, nothing).value) == 0


def test_a_batch_drawn_ahead_is_weighted_for_the_policy_it_came_from():
    """One step back: its log q is of the parameters before, and the update corrects for those of
    now."""
    settings = Settings(
        model=str(TINY),
        samples=32,
        max_new_tokens=8,
        overlap=True,
        warmup_steps=1,
        learning_rate=0.05,
    )
    model = load_model(settings)
    programs = make_programs(settings, model)
    target = Target(lambda _, texts: {}, lambda log_a, _: np.asarray(log_a), headline="")
    stepper = _steps.online(settings, programs, target, jax.random.key(0))
    progress = stepper.begin(programs.tuner.init(model.params))
    ess = []
    for number in range(3):
        old = jnp.array(progress.ahead.log_pi)
        log_pi = programs.score(progress.state.params, progress.ahead.tokens, progress.ahead.where)
        ess.append(float(jnp.abs(log_pi - old).max()))
        progress, record = stepper.step(progress, number)
        assert record["finite"]
    assert ess[0] < 1e-4  # drawn from the very first policy
    assert min(ess[1:]) > 1e-3  # of the policy one step back
    assert record["importance_ess"] < 32 * 0.9999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--algorithm", "ppo"),
            "--algorithm ppo minimises reverse KL: give --divergence reverse_kl",
        ),
        (
            ("--algorithm", "rloo", "--divergence", "reverse_kl", "--overlap"),
            "--overlap is for --algorithm fdpg",
        ),
        (
            ("--algorithm", "rloo", "--divergence", "reverse_kl", "--clip", -8, 8),
            "--clip is for --algorithm fdpg",
        ),
        (
            ("--overlap", "--proposal", "adaptive"),
            "--overlap and --proposal adaptive cannot be had together",
        ),
        (("--proposal-every", 0), "--proposal-every must be at least 1"),
        (
            ("--divergence", "alpha", "--alpha", "nan"),
            "--alpha must be at least -10 and at most 10, got",
        ),
    ],
)
def test_what_does_not_go_together_is_said(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, Config, main, *FREQUENT, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
