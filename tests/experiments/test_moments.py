"""Moments and constraints of one's own functions on the tiny model: a run of two steps, the target
beside the one that has the moments exactly, and what is refused."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.inputs import input_digests
from experiments.common.settings import Settings
from experiments.moments.__main__ import main
from experiments.moments.config import Config
from experiments.moments.target import TASK, load_scorers, make_target, title
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, run

HERE = __name__


def has_w9(texts):
    """About a third of the tiny model's samples."""
    return ["w9" in text.split() for text in texts]


def has_w27(texts):
    return np.array(["w27" in text.split() for text in texts])


def evens(texts):
    """How many of the words, up to 8, have an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) for text in texts]


def either(texts):
    return [not {"w9", "w27"}.isdisjoint(text.split()) for text in texts]


def always(texts):
    return [1] * len(texts)


def raises(texts):
    raise KeyError("no such thing")


def one_number(texts):
    return 0.5


def not_a_number(texts):
    return [float("nan")] * len(texts)


def changes_its_mind(texts):
    """Yes or no, but for what no sample says."""
    return [0.5 if text == "odd" else "w9" in text.split() for text in texts]


def configured(target, moment, **options) -> Config:
    settings = Settings(model=str(TINY), samples=16, max_new_tokens=8)
    names = tuple(f"{HERE}:{name}" for name in target.split())
    given = {"target": names, "moment": moment, "fit_samples": 512}
    return Config(**given | options, settings=settings)


@pytest.fixture(scope="module")
def built():
    return build(TASK, configured("has_w9", (0.5,)))


def target_of(built, target, moment):
    config = configured(target, moment)
    return make_target(config, load_scorers(config), built)


def repeats(prompts, completions):
    """Whether the last word of the prompt is said again."""
    pairs = zip(prompts, completions, strict=True)
    return [prompt.split()[-1] in text.split() for prompt, text in pairs]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("".join(f"w1 w{i}\n" for i in (9, 27, 5, 12, 8, 20, 33, 41)))
    return path


@pytest.mark.command
def test_two_steps_on_prompts(monkeypatch, tmp_path, capsys, prompts):
    target = "--target", f"{HERE}:repeats", f"{HERE}:has_w9", "--moment", 0.5, 0.4
    given = "--prompts", prompts, "--prompts-per-step", 2, "--z-samples", 16, "--fit-samples", 512
    ours = *SMALL, "--steps", 2, "--run-folder", tmp_path / "run"
    assert run(monkeypatch, main, *target, *given, *ours) == 0
    assert "moments, fitted to 512 samples" in " ".join(capsys.readouterr().out.split())
    last = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert np.isfinite([last[-1][f"{HERE}:{name}"] for name in ("repeats", "has_w9")]).all()
    assert np.isfinite(last[-1]["reverse_kl"])


@pytest.mark.parametrize(
    ("normalizer", "moment"), [("per-context", (0.6, 4.0)), ("per-context", (1.0, 4.0)), ("global", (0.6, 4.0))]
)  # fmt: skip
def test_of_prompts_the_moments_are_met_on_average(normalizer, moment, prompts):
    """By the weights of the very samples, normalised for each prompt, or for all together."""
    config = configured("repeats evens", moment, prompts=prompts, prompts_per_step=2, normalizer=normalizer)  # fmt: skip
    built, seen = build(TASK, config), []
    scorers = {
        name: lambda c, x, of=of: seen.append((c, x)) or of(c, x)
        for name, of in load_scorers(config).items()
    }
    target = make_target(config, scorers, built)
    asked, texts = seen[0]
    assert len(texts) == 512
    features = target.features(asked, texts)
    weights = np.exp(target.log_score(np.zeros(512, np.float32), features).astype(float))
    each = [np.array([c.given == prompt for c in asked]) for prompt in {c.given for c in asked}]
    parts = each if normalizer == "per-context" else [np.ones(512, bool)]
    known = [part for part in parts if weights[part].sum() > 0]
    for values, wanted in zip(features.values(), moment, strict=True):
        means = [weights[part] @ values[part] / weights[part].sum() for part in known]
        assert np.mean(means) == pytest.approx(wanted, abs=1e-4)
    assert len(each) == 6  # three of four of the file are to align on


def test_one_prompt_is_aligned_and_evaluated_on():
    config = configured("has_w9", (0.6,), prompt="w1 w27")
    built = build(TASK, config)
    contexts = built.collector.contexts
    assert contexts.training.texts == contexts.unseen.texts == ["w1 w27"]
    assert contexts.per_step == 1
    target = make_target(config, load_scorers(config), built)
    assert target.description.startswith("p(x|c) ∝ a(x|c)·exp(λ·φ(c, x)), with a mean of 0.6")


def test_two_steps(monkeypatch, tmp_path, capsys):
    arguments = "--target", f"{HERE}:has_w9", f"{HERE}:evens", "--moment", 0.6, 5
    more = *SMALL, "--fit-samples", 256, "--steps", 2, "--run-folder", tmp_path / "run"
    assert run(monkeypatch, main, *arguments, *more) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "moments, fitted to 256 samples" in printed
    assert "nats away from the base model" in printed
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (first, last) = (r for r in records if r["kind"] == "evaluation")
    assert 0 < first[f"{HERE}:has_w9"] < 0.6
    assert first[f"{HERE}:evens"] > 1
    assert np.isfinite([first["reverse_kl"], last["forward_kl"]]).all()


TEXTS = [" ".join(some) for some in itertools.product(["w9", "w27", "w1"], repeat=3)]


@pytest.mark.parametrize(
    ("target", "moment"),
    [("has_w9", (0.6,)), ("has_w9 evens", (0.7, 5.0)), ("has_w9 evens has_w27", (1.0, 5.0, 0.2))],
)
def test_the_moments_are_met_on_what_they_were_fitted_to(built, target, moment, monkeypatch):
    """E_p[φ] by the weights P/a of the very samples, to float32: hard and soft moments together."""
    seen = []
    decode = built.collector.decode
    spying = built.collector._replace(decode=lambda *x: seen.append(decode(*x)) or seen[-1])
    made = target_of(built._replace(collector=spying), target, moment)
    texts = [text for batch in seen for text in batch]
    features = made.features([""] * len(texts), texts)
    log_weights = made.log_score(np.zeros(len(texts), np.float32), features)
    weights = np.asarray(jax.nn.softmax(jnp.asarray(log_weights)), float)
    means = [weights @ features[f"{HERE}:{name}"] for name in target.split()]
    np.testing.assert_allclose(means, moment, atol=1e-4)
    assert np.isneginf(log_weights).any() == (moment[0] == 1)


def test_one_constraint_alone_is_the_indicator_times_the_base(built):
    """As lexical_constraint has it: P = a·b, whose KL(p‖π) is at least -log E_π[b]."""
    made = target_of(built, "has_w9", (1.0,))
    log_a = np.arange(len(TEXTS), dtype=np.float32)
    features = made.features([""] * len(TEXTS), TEXTS)
    expected = np.where(["w9" in text for text in TEXTS], log_a, -np.inf)
    np.testing.assert_array_equal(made.log_score(log_a, features), expected)
    assert (made.bound, made.log_bound, made.headline) == (f"{HERE}:has_w9", 0, f"{HERE}:has_w9")
    never = target_of(built, "has_w9", (0.0,))
    expected = np.where(["w9" in text for text in TEXTS], -np.inf, log_a)
    np.testing.assert_array_equal(never.log_score(log_a, features), expected)
    assert never.bound is None


def test_log_p_over_a_is_bounded_where_all_say_yes_or_no(built):
    made = target_of(built, "has_w9 has_w27", (0.7, 0.1))
    features = made.features([""] * len(TEXTS), TEXTS)
    highest = made.log_score(np.zeros(len(TEXTS), np.float32), features).max()
    assert made.log_bound == pytest.approx(highest, rel=1e-6)
    assert target_of(built, "has_w9 evens", (0.7, 5.0)).log_bound is None
    assert made.description == (
        f"p(x) ∝ a(x)·exp(λ·φ(x)), with a mean of 0.7 of {HERE}:has_w9, 0.1 of {HERE}:has_w27"
    )


def test_a_title_is_part_of_a_folders_name():
    name = title(Config(target=("mine.some:f", "g:h"), moment=(0.5, 12.0)))
    assert name == "mine-some-f-0.5-g-h-12-forward_kl"


def test_a_resumed_run_must_find_the_same_functions(built):
    digests = input_digests(configured("has_w9 evens", (0.5, 5.0)), built.model, None)
    assert set(digests) == {"--model", f"--target {HERE}:has_w9", f"--target {HERE}:evens"}


@pytest.mark.parametrize(
    ("target", "moment", "message"),
    [
        ("evens", (9.0,), f"has a mean of 9 of '{HERE}:evens', which is between"),
        ("evens", (8.5,), "Ask for a mean that is strictly between them"),
        ("has_w9", (1.5,), "which is between 0 and 1 in all 512 of them, and 0."),
        ("either has_w9", (0.1, 0.9), "contradict each other"),
        ("always", (1.0,), "is 1 for all 512 samples of the base model, which has that mean"),
        ("always", (0.5,), "which is between 1 and 1 in all 512 of them, and 1 on average"),
    ],
)
def test_moments_that_cannot_be_had_are_named_before_any_step(built, target, moment, message):
    with pytest.raises(RunError) as error:
        target_of(built, target, moment)
    assert message in str(error.value)


def test_a_function_that_says_something_new_is_named(built):
    made = target_of(built, "changes_its_mind", (0.5,))
    with pytest.raises(RunError, match="5 for the text 'odd'"):
        made.features([""] * 2, ["w9", "odd"])


def test_few_effective_samples_are_warned_of(built, capsys):
    target_of(built, "evens", (6.9,))
    assert "effective samples of 512, as its errors show" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raises failed on 2 texts, KeyError: 'no such thing'"),
        ("one_number", "must return one number a text, got float"),
        ("not_a_number", "returned nan for the text"),
        ("nowhere", "--target"),
    ],
)
def test_a_function_that_cannot_be_used_is_a_sentence(name, message):
    with pytest.raises(RunError) as error:
        TASK.make_target(configured(name, (0.5,)))
    assert message in str(error.value)


def test_bad_input_is_named():
    with pytest.raises(RunError, match="Give a function of texts and its mean"):
        TASK.make_target(Config())
    for target, moment, message in (
        (("mine",), (0.5,), "--target is module:function, got 'mine'"),
        (("a:f", "a:f"), (0.5, 0.5), "the same function twice"),
        (("a:f", "a:g"), (0.5,), "got 2 functions and 1 moments"),
        (("a:f",), (float("nan"),), "--moment must be at least"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(target=target, moment=moment)
    for options, message in (
        ({"prompt": " "}, "--prompt must not be empty"),
        ({"prompt": "w1", "prompts": Path("p.txt")}, "Give one --prompt, or a file of --prompts"),
        ({"chat": True}, "--chat goes with --prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            configured("has_w9", (0.5,), **options)
