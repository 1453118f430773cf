"""RLHF on the tiny model with rewards of one's own, and the built-in reward model on a few labels."""

import zipfile

import numpy as np
import pytest

from experiments._run_folder import RunError
from experiments.sentiment_reward import reward_model
from experiments.sentiment_reward.config import Config
from experiments.sentiment_reward.run import checked, main
from fjax.training import read_jsonl

from .commands import SMALL, run


def length_reward(texts):
    """For --reward: the share of w9 among the words."""
    return [text.split().count("w9") / max(len(text.split()), 1) for text in texts]


def broken_reward(texts):
    raise KeyError("no such thing")


@pytest.fixture
def experiment(monkeypatch):
    return lambda *arguments: run(monkeypatch, Config, main, *arguments)


def test_two_steps_with_a_function_of_ones_own(experiment, tmp_path):
    settings = (*SMALL, "--steps", 2, "--run-folder", tmp_path / "run")
    assert experiment("--reward", f"{__name__}:length_reward", "--beta", 0.5, *settings) == 0
    records = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"]
    assert np.isfinite([r["reward"] for r in records]).all()
    assert np.isfinite([r["reverse_kl"] for r in records]).all()


def test_two_steps_with_the_built_in_reward(experiment, tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "sentence_polarity.zip", "w") as archive:
        for name, word in (("neg", "dull"), ("pos", "great")):
            lines = [f"film number {i} is {word} ." for i in range(60)]
            archive.writestr(f"sentence_polarity/rt-polarity.{name}", "\n".join(lines))
    monkeypatch.setattr(reward_model, "EPOCHS", 1)
    settings = ("--samples", 4, "--eval-samples", 8, "--max-new-tokens", 4, "--steps", 2, "--run-folder", tmp_path / "run")
    folder = tmp_path / "reward"
    assert experiment("--corpora", tmp_path, "--reward-folder", folder, *settings) == 0
    assert "held-out snippets are classified as people did" in capsys.readouterr().out
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    again = ("--run-folder", tmp_path / "again", *settings[:-2])
    assert experiment("--reward", folder, *again) == 0
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights


def test_the_scores_do_not_depend_on_the_batches():
    base = reward_model.fjax.from_pretrained(reward_model.BUILT_IN)
    params = {"transformer": base.params, "score": {"kernel": np.ones((base.config.n_embd, 1), np.float32)}}
    model = reward_model.RewardModel(base.config, params, base.tokenizer, reward_model.gpt2.score_fn(base.config))
    rows = [np.array([0, *range(5, 5 + n), 0], np.int32) for n in (1, 9, 4, 20, 2)]
    together = reward_model.score_rows(model, rows)
    alone = [reward_model.score_rows(model, [row], batch_size=2)[0] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reward", "nowhere:f"), "--reward nowhere:f cannot be imported"),
        (("--reward", "math:nowhere"), "--reward math:nowhere cannot be imported"),
        (("--reward", f"{__name__}:broken_reward"), "broken_reward failed on"),
        (("--reward", "./nowhere"), "Cannot load the reward model"),
        (("--beta", 0.0), "--beta must be at least 1e-06"),
        (("--corpora", "./nowhere", "--reward-folder", "./nowhere"), "No labelled snippets at nowhere"),
    ],
)
def test_bad_input_is_named(experiment, tmp_path, capsys, arguments, message):
    assert experiment(*SMALL, "--steps", 2, "--run-folder", tmp_path / "run", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


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
