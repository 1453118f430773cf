"""What a run would need, said before anything is loaded: for each way to train, with and without prompts."""

import pytest

from experiments.conditional.__main__ import main as conditional
from experiments.lexical_constraint.__main__ import main as lexical
from experiments.preference_pairs.__main__ import main as pairs

from .commands import SMALL, run


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (lexical, ("--word", "w9")),
        (lexical, ("--word", "w9", "--lora-rank", 1, "--stages", "forward_kl:32:2")),
        (lexical, ("--word", "w9", "--mesh", "data=2,fsdp=2,tensor=2", "--base-fraction", 0.25)),
        (conditional, ("--predicate", "turns", "--prompts-per-step", 4)),
    ],
)
def test_it_says_what_each_device_needs(main, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    small = list(SMALL)
    if main is conditional:
        small[small.index("--model") + 1] = "built-in"
    assert run(monkeypatch, main, *arguments, *small, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "What each device needs" in printed
    assert ("Moved between devices" in printed) == ("--mesh" in arguments)
    counted, by_xla = (
        int(word.replace(",", "")) for word in printed.split("Arguments of the update:")[1].split()
        if word.replace(",", "").isdigit()
    )  # fmt: skip
    assert abs(counted - by_xla) < 0.05 * by_xla
    assert not list(tmp_path.iterdir())


def test_a_task_that_draws_nothing_is_refused(monkeypatch, capsys):
    assert run(monkeypatch, pairs, *SMALL[:2], "--pairs", "none.jsonl", "--dry-run") == 2
    assert "preference_pairs reads pairs" in " ".join(capsys.readouterr().err.split())
