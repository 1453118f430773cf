"""RLHF on the tiny model with rewards of one's own, and the built-in reward model on a few
labels."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments.common import reward_model
from experiments.common.rewards import checked, make_reward
from experiments.common.settings import Settings
from experiments.sentiment_reward.__main__ import main
from experiments.sentiment_reward.config import Config
from experiments.sentiment_reward.target import TASK
from fjax.runs import RunError
from fjax.training import read_jsonl

from .commands import SMALL, TINY, build, run


def length_reward(texts):
    """For --reward: the share of w9 among the words."""
    return [text.split().count("w9") / max(len(text.split()), 1) for text in texts]


def broken_reward(texts):
    raise KeyError("no such thing")


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, main, *arguments)


@pytest.mark.command
def test_two_steps_with_a_function_of_ones_own(experiment, tmp_path):
    settings = (*SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment("--reward", f"{__name__}:length_reward", "--beta", 0.5, *settings) == 0
    records = [
        r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"
    ]
    assert np.isfinite([r["reward"] for r in records]).all()
    assert np.isfinite([r["reverse_kl"] for r in records]).all()


def test_two_steps_with_the_built_in_reward(experiment, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "sentence_polarity.zip", "w") as archive:
        for name, word in (("neg", "dull"), ("pos", "great")):
            lines = [f"film number {i} is {word} ." for i in range(60)]
            archive.writestr(f"sentence_polarity/rt-polarity.{name}", "\n".join(lines))
    monkeypatch.setattr(reward_model, "EPOCHS", 1)
    folder = tmp_path / "reward"
    settings = (*SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment("--corpora", tmp_path, "--reward-folder", folder, *settings) == 0
    assert "held-out snippets are classified as people did" in capsys.readouterr().out
    assert reward_model.load(folder).text_format == "end text end"
    # From then on it is there, by its folder or as the built-in one.
    monkeypatch.setattr(reward_model, "train", None)
    texts = ["a great film", "dull"]
    by_name = make_reward("sentiment", folder, tmp_path)(texts)
    np.testing.assert_array_equal(make_reward(str(folder), tmp_path, tmp_path)(texts), by_name)


def test_the_scores_do_not_depend_on_the_batches():
    base = reward_model.fjax.from_pretrained(reward_model.BUILT_IN)
    params = {
        "transformer": base.params,
        "score": {"kernel": np.ones((base.config.n_embd, 1), np.float32)},
    }
    model = reward_model.RewardModel(
        base.config, params, base.tokenizer, reward_model.gpt2.score_fn(base.config)
    )
    rows = [np.array([0, *range(5, 5 + n), 0], np.int32) for n in (1, 9, 4, 20, 2)]
    together = reward_model.score_rows(model, rows)
    alone = [reward_model.score_rows(model, [row], batch_size=2)[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "nowhere:f"}, "--reward nowhere:f cannot be imported"),
        ({"reward": "math:nowhere"}, "--reward math:nowhere cannot be imported"),
        ({"reward": f"{__name__}:broken_reward"}, "broken_reward failed on"),
        ({"reward": "./nowhere"}, "Cannot load the reward model"),
        ({"beta": 0.0}, "--beta must be at least 1e-06"),
        (
            {"corpora": Path("nowhere"), "reward_folder": Path("nowhere")},
            "No labelled snippets at nowhere",
        ),
    ],
)
def test_bad_input_is_named(options, message):
    """That the command says it in a sentence: test_bad_input.py."""
    small = {"model": str(TINY), "max_new_tokens": 8, "divergence": "reverse_kl"}
    with pytest.raises((ValueError, RunError)) as error:
        build(TASK, Config(**options, settings=Settings(**small)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"one number a text, got list of shape \(1,\) for 2 texts"),
        ([1.0, np.nan], "returned nan for the text 'b'"),
        (["x", "y"], "got list of str"),
    ],
)
def test_a_reward_that_is_no_reward_is_named(answer, message):
    with pytest.raises(RunError, match=message):
        checked(lambda texts: answer, "mine")(["a", "b"])


@pytest.fixture(scope="module")
def of_chance():
    """A reward model with a head of chance on the built-in model; 0 is its end token."""
    base = reward_model.fjax.from_pretrained(reward_model.BUILT_IN)
    kernel = np.random.default_rng(0).normal(size=(base.config.n_embd, 1)).astype(np.float32)
    params = {"transformer": base.params, "score": {"kernel": kernel}}
    return reward_model.RewardModel(
        base.config, params, base.tokenizer, reward_model.gpt2.score_fn(base.config)
    )


@pytest.mark.parametrize(
    ("text_format", "before", "behind"),
    [
        (None, [], []),
        ("text", [], []),
        ("end text", [0], []),
        ("text end", [], [0]),
        ("end text end", [0], [0]),
    ],
)
def test_texts_are_scored_in_the_format_of_the_model(of_chance, text_format, before, behind):
    model = of_chance._replace(text_format=text_format)
    texts = ["a great film", "dull <|endoftext|> dull", ""]
    ids = [model.tokenizer(text, split_special_tokens=True).input_ids for text in texts]
    assert all(0 not in row for row in ids)  # the second spells the end, and does not have it
    rows = [np.array([*before, *row, *behind] or [0], np.int32) for row in ids]
    np.testing.assert_array_equal(
        reward_model.score_texts(model, texts), reward_model.score_rows(model, rows)
    )
    assert [
        row.tolist()
        for row in reward_model.text_rows(model.tokenizer, texts, text_format or "text")
    ] == [row.tolist() for row in rows]


def test_the_format_of_a_folder_is_kept_and_a_missing_one_is_said(of_chance, tmp_path, capsys):
    """A foreign folder's texts are scored as they are; the built-in reward of an older version as
    it was trained."""
    texts = ["a great film", "dull"]
    for text_format in (None, "text", "end text end"):
        folder = tmp_path / str(text_format)
        reward_model.save_reward_model(
            folder, of_chance.params, of_chance.config, of_chance.tokenizer, text_format=text_format
        )
        expected = reward_model.score_texts(of_chance._replace(text_format=text_format), texts)
        found = make_reward(str(folder), tmp_path, tmp_path)(texts)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert ("says no text_format" in capsys.readouterr().out) is (text_format is None)
    built_in = make_reward("sentiment", tmp_path / "None", tmp_path)(texts)
    np.testing.assert_allclose(built_in, expected, rtol=1e-4)
    assert "text_format" not in capsys.readouterr().out
