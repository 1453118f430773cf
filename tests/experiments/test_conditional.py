"""Conditional constraints on the tiny model: prompts in, one Z a prompt, evaluated on others; and
every kind of bad input."""

import jax
import numpy as np
import pytest

from experiments._programs import Contexts, base_samples, load_model, make_programs
from experiments._prompts import Prompts, encode
from experiments._settings import Settings
from experiments.conditional.config import Config
from experiments.conditional.predicates import repeats, turns
from experiments.conditional.run import main
from fjax.training import read_jsonl

from .commands import SMALL, TINY, run

HERE = "tests.experiments.test_conditional"
WORDS = ("w9", "w19", "w26", "w42", "w27", "w7", "w12", "w30")


def same_word(prompt, continuation):
    return prompt.split()[-1] in continuation.split()


def thrice(prompt, continuation):
    return continuation.split().count(prompt.split()[-1]) > 2


def broken(prompt, continuation):
    return [1, 2] if "w" in continuation else 1 / 0


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    training, unseen = tmp_path / "training.txt", tmp_path / "unseen.txt"
    training.write_text("".join(f"w1 {word}\n" for word in WORDS))
    unseen.write_text("".join(f"w2 w3 {word}\n" for word in WORDS))
    given = ("--prompts", training, "--unseen-prompts", unseen, "--prompts-per-step", 4)

    def call(*arguments, predicate="same_word"):
        return run(
            monkeypatch,
            Config,
            main,
            *given,
            *SMALL,
            "--predicate",
            f"{HERE}:{predicate}",
            *arguments,
        )

    return call


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


def test_a_batch_has_the_samples_of_each_prompt_together():
    """And to_rollout puts the policy's and the base model's samples of a prompt into one row."""
    settings = Settings(model=str(TINY), samples=32, max_new_tokens=8, base_fraction=0.25)
    model = load_model(settings)
    prompts = encode([f"w1 {word}" for word in WORDS], model.tokenizer)
    programs = make_programs(settings, model, Contexts(prompts, prompts, per_step=4))
    batch = programs.draw_unseen(1, model.params, jax.random.key(0))
    assert batch.from_policy == 24
    assert (
        np.asarray(batch.contexts).tolist()
        == [4] * 6 + [5] * 6 + [6] * 6 + [7] * 6 + [4] * 2 + [5] * 2 + [6] * 2 + [7] * 2
    )
    rollout = programs.to_rollout(batch, np.arange(32, dtype=np.float32))
    assert rollout.contexts.tolist() == [4, 5, 6, 7]
    assert rollout.strata.tolist() == [[0] * 6 + [1] * 2] * 4
    assert rollout.log_score[1].tolist() == [6, 7, 8, 9, 10, 11, 26, 27]
    for row, i in zip(rollout.tokens, rollout.contexts, strict=True):
        expected = prompts.tokens[i][prompts.where[i]]
        assert (np.asarray(row)[:, : len(expected)] == expected).all()
    # Scoring the rows again gives the sampler's own log-probability: nothing is shifted by the
    # prompts.
    again = programs.score(model.params, batch.tokens, batch.where)
    np.testing.assert_allclose(again, batch.log_a, atol=1e-4)


@pytest.mark.parametrize(
    ("fraction", "of_each"), [(0.0, 0), (0.01, 1), (0.125, 1), (0.5, 2), (0.9, 3)]
)
def test_a_share_of_base_samples_is_never_none_and_never_all(fraction, of_each):
    """A13: an eighth of 4 samples a prompt was rounded to 0, in silence; 0.9 of 4 to 4. Without
    prompts likewise."""
    prompts = Prompts(
        ["a", "b", "c", "d"], np.zeros((4, 2), np.int32), np.ones((4, 2), bool), [""] * 4
    )
    settings = Settings(samples=16, base_fraction=fraction)
    assert base_samples(settings, Contexts(prompts, prompts, per_step=4)) == 4 * of_each
    assert base_samples(Settings(samples=4, base_fraction=fraction), None) == of_each
    assert (
        base_samples(
            Settings(samples=4, base_fraction=fraction, algorithm="rloo", divergence="reverse_kl"),
            None,
        )
        == 0
    )


def test_which_prompts_are_chosen_says_nothing_of_what_is_drawn(monkeypatch):
    """A13: the choice of prompts and row 0 had one key. No row of samples may fold in what chooses
    them."""
    settings = Settings(model=str(TINY), samples=32, max_new_tokens=8, base_fraction=0.25)
    model = load_model(settings)
    prompts = encode([f"w1 {word}" for word in WORDS], model.tokenizer)
    programs = make_programs(settings, model, Contexts(prompts, prompts, per_step=4))
    chosen, rng_key = [], jax.random.key(3)
    monkeypatch.setattr(
        jax.random,
        "choice",
        lambda key, *args, before=jax.random.choice, **options: (
            chosen.append(key) or before(key, *args, **options)
        ),
    )
    programs.draw(model.params, rng_key)
    rows = jax.vmap(jax.random.fold_in, (None, 0))(rng_key, np.arange(32))
    assert all((jax.random.key_data(chosen[0]) != jax.random.key_data(row)).any() for row in rows)
    assert (jax.random.key_data(chosen[0]) != jax.random.key_data(rng_key)).any()


@pytest.mark.parametrize(
    ("arguments", "predicate", "message"),
    [
        (("--prompts-per-step", 9), "same_word", "must be a multiple of the 9 prompts a step"),
        (
            ("--samples", 40, "--prompts-per-step", 10),
            "same_word",
            "There are 8 prompts to align on, fewer than the 10",
        ),
        (("--max-new-tokens", 4096), "same_word", "Ask for at most"),
        ((), "nowhere", "cannot be imported, AttributeError"),
        ((), "WORDS", "is tuple, not a function"),
        (
            (),
            "broken",
            "failed on the prompt 'a prompt' and the continuation ' and a continuation', "
            "ZeroDivisionError",
        ),
        (
            ("--predicate", "nonsense"),
            "same_word",
            "--predicate is turns, repeats or module:function",
        ),
        (("--prompts-per-step", 1), "same_word", "--prompts-per-step must be at least 2"),
        (("--prompts", "/nowhere.txt"), "same_word", "Cannot read the prompts /nowhere.txt"),
    ],
)
def test_bad_input_is_named_before_any_step(
    experiment, tmp_path, capsys, arguments, predicate, message
):
    assert (
        experiment("--steps", 2, "--run-folder", tmp_path / "run", *arguments, predicate=predicate)
        == 2
    )
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_prompts_to_evaluate_on_must_be_others(experiment, tmp_path, capsys):
    same = tmp_path / "same.txt"
    same.write_text("w1 w9\nw1 w19\nw5\nw6\n")
    assert experiment("--steps", 2, "--unseen-prompts", same) == 2
    assert "2 prompts are in both files, 'w1 w19' first" in " ".join(
        capsys.readouterr().err.split()
    )
