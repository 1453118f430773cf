"""Digests of what a run reads, its folder by name, and a comparison that is going on already."""

import os
from pathlib import Path

import jax
import pytest

import fjax
from experiments.common.build import choose_folder
from experiments.common.inputs import input_digests
from experiments.common.settings import Settings
from experiments.compare import run as compare
from experiments.compare.config import Config as Comparison
from experiments.conditional.config import Config as Conditional
from experiments.lexical_constraint.config import Config
from experiments.sentiment_reward.config import Config as Sentiment
from fjax.runs import RunError
from fjax.runs.folder import locked

from .commands import TINY


def test_a_run_has_the_folder_that_is_named_or_the_next_of_its_title(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = Settings(run_folder=Path("mine"))
    assert choose_folder(named, "task", "title") == (Path("mine"), False)
    for number in (0, 1):
        made = choose_folder(Settings(), "task", "title")
        assert made == (Path(f"runs/task/title-{number}"), True)
    (made[0] / "config.json").write_text("{}")
    assert choose_folder(Settings(resume=True), "task", "title") == (made[0], False)
    with pytest.raises(RunError, match=r"no run runs/task/other-\* to resume"):
        choose_folder(Settings(resume=True), "task", "other")


def test_a_comparison_in_use_is_refused(tmp_path):
    """Before it writes anything: two at once would start each other's runs."""
    folder = tmp_path / "comparison"
    folder.mkdir()
    with (
        locked(folder),
        pytest.raises(RunError, match=f"comparison is in use by process {os.getpid()}"),
    ):
        compare._make(
            Comparison(task="lexical_constraint", folder=folder, objectives=("jensen_shannon",)),
            folder,
            [],
        )
    assert list(folder.iterdir()) == []


def test_digests_are_of_all_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("prompts.txt", "unseen.txt"):
        Path(name).write_text("w1 w2\n")
    Path("digested.py").write_text("def holds(prompt, text):\n    return True\n")
    Path("reward").mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        Path("reward", name).write_text(name)
    conditional = Conditional(
        predicate="digested:holds", prompts=Path("prompts.txt"), unseen_prompts=Path("unseen.txt")
    )
    model = fjax.from_pretrained(TINY)

    def changed(config, path, text):
        before = input_digests(config, model, None)
        kept = Path(path).read_text()
        Path(path).write_text(text)
        after = input_digests(config, model, None)
        Path(path).write_text(kept)
        assert before.keys() == after.keys()
        return [name for name in before if before[name] != after[name]]

    assert changed(conditional, "prompts.txt", "w1\n") == ["--prompts prompts.txt"]
    assert changed(conditional, "unseen.txt", "w1\n") == ["--unseen-prompts unseen.txt"]
    assert changed(conditional, "digested.py", "def holds(*_):\n    return False\n") == [
        "--predicate digested:holds"
    ]
    assert changed(Sentiment(reward="reward"), "reward/model.safetensors", "") == [
        "--reward reward"
    ]
    assert changed(Sentiment(reward="reward"), "reward/README.md", "") == []
    assert changed(Sentiment(reward_folder=Path("reward")), "reward/config.json", "") == [
        "--reward-folder reward"
    ]
    assert list(input_digests(Sentiment(reward_folder=Path("nowhere")), model, None)) == ["--model"]

    params = jax.tree.map(
        lambda x: x.at[(0,) * x.ndim].add(1e-7) if x.ndim == 2 else x, model.params
    )
    other = input_digests(Config(), model._replace(params=params), model)
    assert other["--start"] == input_digests(Config(), model, None)["--model"] != other["--model"]
