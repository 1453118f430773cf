"""Conditional constraints on the tiny model: prompts in, one Z a prompt, evaluated on others; and
every kind of bad input."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.common.build import load_model, make_collector
from experiments.common.prompt_files import read_prompt_file
from experiments.common.prompts import encode
from experiments.common.settings import Settings, as_json
from experiments.conditional.__main__ import main
from experiments.conditional.config import Config
from experiments.conditional.predicates import repeats, turns
from experiments.conditional.target import TASK, make_target
from fjax.rollouts import Contexts, Prompts, to_rollout
from fjax.runs import RunError
from fjax.runs.folder import check_same
from fjax.training import read_jsonl
from fjax.training._record import other_run

from .commands import SMALL, TINY, build, run

HERE = "tests.experiments.test_conditional"
WORDS = ("w9", "w19", "w26", "w42", "w27", "w7", "w12", "w30")


SETTINGS = Settings(model=str(TINY), samples=32, max_new_tokens=8, base_fraction=0.25)


def same_word(prompt, continuation):
    return prompt.split()[-1] in continuation.split()


def thrice(prompt, continuation):
    return continuation.split().count(prompt.split()[-1]) > 2


SEEN = []


def has_word(prompt, continuation, word):
    SEEN.append(prompt)
    return word in continuation.split()


def has_answer(prompt, continuation, answer):
    return True


def broken(prompt, continuation):
    return [1, 2] if "w" in continuation else 1 / 0


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Files to align on and to evaluate on."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "training.txt").write_text("".join(f"w1 {word}\n" for word in WORDS))
    (folder / "unseen.txt").write_text("".join(f"w2 w3 {word}\n" for word in WORDS))
    return folder / "training.txt", folder / "unseen.txt"


@pytest.fixture
def experiment(monkeypatch, prompts):
    training, unseen = prompts
    given = ("--prompts", training, "--unseen-prompts", unseen, "--prompts-per-step", 4, *SMALL)

    def call(*arguments, predicate="same_word"):
        return run(monkeypatch, main, *given, "--predicate", f"{HERE}:{predicate}", *arguments)

    return call


@pytest.fixture(scope="module")
def model():
    return load_model(SETTINGS)


def test_a_word_of_the_prompt_used_again():
    assert repeats("the big film", " is a Film of sorts")
    assert not repeats("the big film", " is a tale ; films")
    assert not repeats("it is a", " it is a")  # short words do not count
    assert not repeats(". . .", " . .")


def test_a_turn_against_the_opening():
    assert turns("a fine film", " , But not a great one")
    assert not turns("it is funny but", " long , but short")
    assert turns("it is funny but", " long , though short")
    assert not turns("a fine film", " , butter included")


@pytest.mark.command
@pytest.mark.parametrize("normalizer", ["per-context", "global"])
def test_a_run_evaluates_on_unseen_prompts(normalizer, experiment, tmp_path, capsys):
    folder = tmp_path / "run"
    assert experiment("--steps", 2, "--normalizer", normalizer, "--run-folder", folder) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "continuing 8 unseen prompts" in printed
    assert (
        "Figures are means over 7 of 8 unseen prompts (12% have an unknown Z and are left out)."
        in printed
    )
    assert "Check KL(p‖π) ≥ -log E_π[b]" in printed
    # one of each prompt, and not none in silence
    assert "2 steps of 16 samples (4 of the base model)" in printed
    records = read_jsonl(folder / "metrics.jsonl")
    last = [r for r in records if r["kind"] == "evaluation"][-1]
    for name in ("satisfaction", "kl_to_base", "entropy", "jensen_shannon", "known"):
        assert np.isfinite(last[name]), name
    contexts = read_jsonl(folder / "contexts.jsonl")
    assert {r["prompt"] for r in contexts} == {f"w2 w3 {word}" for word in WORDS}
    known = [np.isfinite(r["log_z"]) for r in contexts if r["step"] == 2]
    assert np.mean(known) == last["known"] == 7 / 8  # of one prompt no sample has the word
    z = [{r["prompt"]: r["log_z"] for r in contexts if r["step"] == step} for step in (0, 2)]
    assert z[0] == z[1]  # one target throughout
    means = np.array([r["satisfaction"] for r in contexts if r["step"] == 2])
    np.testing.assert_allclose(means[known].mean(), last["satisfaction"], atol=1e-6)
    np.testing.assert_allclose(
        np.mean([r["log_z"] for r in contexts if r["step"] == 2 and np.isfinite(r["log_z"])]),
        last["log_z"],
    )
    assert {r["prompt"] for r in read_jsonl(folder / "samples.jsonl")} <= {
        f"w2 w3 {word}" for word in WORDS
    }
    assert (folder / "contexts.png").read_bytes()[:4] == b"\x89PNG"


def test_a_batch_has_the_samples_of_each_prompt_together(model):
    """And to_rollout puts the policy's and the base model's samples of a prompt into one row."""
    prompts = encode([f"w1 {word}" for word in WORDS], model.tokenizer)
    contexts = Contexts(prompts, prompts, per_step=4)
    collector = make_collector(SETTINGS, model, contexts)
    batch = collector.draw_unseen(1, model.params, jax.random.key(0))
    assert batch.from_policy == 24
    assert (
        np.asarray(batch.contexts).tolist()
        == [4] * 6 + [5] * 6 + [6] * 6 + [7] * 6 + [4] * 2 + [5] * 2 + [6] * 2 + [7] * 2
    )
    rollout = to_rollout(batch, np.arange(32, dtype=np.float32), contexts=contexts)
    assert rollout.contexts.tolist() == [4, 5, 6, 7]
    assert rollout.strata.tolist() == [[0] * 6 + [1] * 2] * 4
    assert rollout.log_score[1].tolist() == [6, 7, 8, 9, 10, 11, 26, 27]
    for row, i in zip(rollout.tokens, rollout.contexts, strict=True):
        expected = prompts.tokens[i][prompts.where[i]]
        assert (np.asarray(row)[:, : len(expected)] == expected).all()
    # Scoring the rows again gives the sampler's own log-probability: nothing is shifted by the
    # prompts.
    again = collector.score(model.params, batch.tokens, batch.where)
    np.testing.assert_allclose(again, batch.log_a, atol=1e-4)


@pytest.mark.parametrize(
    ("fraction", "of_each"), [(0.0, 0), (0.01, 1), (0.125, 1), (0.5, 2), (0.9, 3)]
)
def test_a_share_of_base_samples_is_never_none_and_never_all(fraction, of_each, model):
    """A13: an eighth of 4 samples a prompt was rounded to 0, in silence; 0.9 of 4 to 4. Without
    prompts likewise."""
    prompts = Prompts(
        ["a", "b", "c", "d"], np.zeros((4, 2), np.int32), np.ones((4, 2), bool), [""] * 4
    )

    def base_samples(settings, contexts=None):
        return settings.samples - make_collector(settings, model, contexts).policy_samples

    settings = dataclasses.replace(SETTINGS, samples=16, base_fraction=fraction)
    assert base_samples(settings, Contexts(prompts, prompts, per_step=4)) == 4 * of_each
    few = dataclasses.replace(settings, samples=4)
    assert base_samples(few) == of_each
    own = dataclasses.replace(few, algorithm="rloo", divergence="reverse_kl")
    assert base_samples(own) == 0


def test_which_prompts_are_chosen_says_nothing_of_what_is_drawn(model, monkeypatch):
    """A13: the choice of prompts and row 0 had one key. No row of samples may fold in what chooses
    them."""
    prompts = encode([f"w1 {word}" for word in WORDS], model.tokenizer)
    contexts = Contexts(prompts, prompts, per_step=4)
    collector = make_collector(SETTINGS, model, contexts)
    chosen, rng_key = [], jax.random.key(3)
    monkeypatch.setattr(
        jax.random,
        "choice",
        lambda key, *args, before=jax.random.choice, **options: (
            chosen.append(key) or before(key, *args, **options)
        ),
    )
    collector.draw(model.params, rng_key)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, np.arange(32))
    assert all((jax.random.key_data(chosen[0]) != jax.random.key_data(row)).any() for row in rows)
    assert (jax.random.key_data(chosen[0]) != jax.random.key_data(rng_key)).any()


def test_a_predicate_is_given_the_columns_that_it_names(tmp_path):
    """And the prompt as its file has it; a built-in one its text."""
    path = tmp_path / "p.jsonl"
    talk = [{"role": "user", "content": "the big film"}]
    path.write_text(
        f'{{"prompt": "w1", "word": "w2"}}\n{json.dumps({"messages": talk, "word": "x"})}'
    )
    features = make_target(Config(prompts=path, predicate=f"{HERE}:has_word")).features
    asked = read_prompt_file(path)[0]
    assert features(asked, ["w2 w3", "w2 x"])["satisfaction"].tolist() == [1.0, 1.0]
    assert features(asked, ["w3", "w2"])["satisfaction"].tolist() == [0.0, 0.0]
    assert SEEN[-1] == talk
    built_in = make_target(Config(prompts=path, predicate="repeats")).features
    assert built_in(asked, ["w1", "a Film"])["satisfaction"].tolist() == [0.0, 1.0]
    with pytest.raises(RunError, match="asks for 'answer', which 2 of 2 prompts have not"):
        make_target(Config(prompts=path, predicate=f"{HERE}:has_answer"))


def test_a_run_from_before_there_were_conversations_goes_on(tmp_path):
    """By its folder and by its checkpoints: what there was not was off."""
    new = ("chat", "system", "prompt", "prompt_column", "prompts_too_long")
    values = as_json(Config())
    old = {k: v for k, v in values.items() if k not in new}
    assert len(old) == len(values) - len(new)
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_same(tmp_path, values)
    assert other_run({"about": old}, values) is None
    chat = as_json(Config(prompts=Path("p.txt"), chat=True)) | {"prompts": None}
    with pytest.raises(RunError, match="chat: None there, True now"):
        check_same(tmp_path, chat)
    assert "chat: None there, True here" in str(other_run({"about": old}, chat))
    assert "chat: True there" in str(other_run({"about": chat}, values))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"prompts_per_step": 9}, {}, "must be a multiple of the 9 prompts a step"),
        (
            {"prompts_per_step": 10},
            {"samples": 40},
            "There are 8 prompts to align on, fewer than the 10",
        ),
        ({}, {"max_new_tokens": 4096}, "Ask for at most"),
        ({"predicate": f"{HERE}:nowhere"}, {}, "cannot be imported, AttributeError"),
        ({"predicate": f"{HERE}:WORDS"}, {}, "is tuple, not a function"),
        (
            {"predicate": f"{HERE}:broken"},
            {},
            "failed on the prompt 'w1 w9' and the continuation ' and a continuation', "
            "ZeroDivisionError",
        ),
        ({"predicate": "nonsense"}, {}, "--predicate is turns, repeats or module:function"),
        ({"prompts_per_step": 1}, {}, "--prompts-per-step must be at least 2"),
        ({"prompts": Path("/nowhere.txt")}, {}, "Cannot read the prompts /nowhere.txt"),
        ({"prompts": None}, {}, "--unseen-prompts go with --prompts"),
    ],
)
def test_bad_input_is_named_before_any_step(prompts, options, settings, message):
    training, unseen = prompts
    given = {"prompts": training, "unseen_prompts": unseen, "predicate": f"{HERE}:same_word"}
    small = Settings(**{"model": str(TINY), "samples": 16, "max_new_tokens": 8} | settings)
    with pytest.raises((ValueError, RunError)) as error:
        build(TASK, Config(**given | {"prompts_per_step": 4} | options, settings=small))
    assert message in str(error.value)


def test_the_command_says_it_in_a_sentence_and_begins_nothing(experiment, tmp_path, capsys):
    """Prompts to evaluate on must be others."""
    same = tmp_path / "same.txt"
    same.write_text("w1 w9\nw1 w19\nw5\nw6\n")
    arguments = ("--steps", 2, "--run-folder", tmp_path / "run", "--unseen-prompts", same)
    assert experiment(*arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "2 prompts are in both files, 'w1 w19' first" in shown
    assert not (tmp_path / "run").exists()
