"""Whoever comes from TRL: their flags are answered with ours, which exist, and never taken."""

import re

import pytest

from experiments.common import arguments
from experiments.common.trl_flags import TRL_FLAGS
from experiments.lexical_constraint.__main__ import main
from experiments.pretrain.config import Config as Pretrain
from experiments.rlhf.config import Config as Rlhf
from experiments.tasks import TASKS

from .commands import run

OURS = {arguments.flag(name) for task in TASKS for name in arguments.names_of(task.config)}


@pytest.mark.parametrize("theirs", TRL_FLAGS)
def test_an_answer_names_flags_that_there_are(theirs):
    found = set(re.findall(r"--[a-z][a-z-]*", TRL_FLAGS[theirs]))
    assert found <= OURS, found - OURS
    assert TRL_FLAGS[theirs].endswith(".")
    assert theirs not in OURS


@pytest.mark.parametrize(
    "given",
    [
        ("--num-generations", "8"),
        ("--num_generations=8",),
        ("--word", "great", "--num_generations", "8"),
        ("--steps", "nan", "--num-generations", "8"),  # before anything else that is wrong
    ],
)
def test_a_flag_of_theirs_is_answered_and_not_taken(given, monkeypatch, capsys):
    assert run(monkeypatch, main, *given) == 2
    shown, error = capsys.readouterr()
    assert shown == ""
    assert "There is no --num-generations here, which is TRL's: --samples is what a step" in error
    assert "Unrecognized" not in error


def test_a_flag_that_a_command_has_is_its_own():
    """TRL's beta is β here too, where there is a reward; of all commands one has a weight decay, and
    none a temperature."""
    assert arguments.parse(Rlhf, "x", ("--beta", "0.5")).beta == 0.5
    assert arguments.parse(Pretrain, "x", ("--weight-decay", "0.5")).weight_decay == 0.5
    with pytest.raises(ValueError, match=r"no --weight-decay here, .* p itself is what holds"):
        arguments.parse(Rlhf, "x", ("--weight-decay", "0.5"))
    with pytest.raises(ValueError, match=r"no --temperature here, .* at temperature 1: p is made"):
        arguments.parse(Rlhf, "x", ("--temperature", "0.7"))


def test_what_is_for_another_command_is_left_to_it():
    from experiments.compare.config import Config

    given = ("--task", "rlhf", "--objectives", "rloo", "--", "--bf16")
    assert arguments.parse(Config, "compare", given).arguments == ("--bf16",)


def test_any_other_flag_is_answered_as_before(monkeypatch, capsys):
    assert run(monkeypatch, main, "--no-such-flag", "1") == 2
    assert "--no-such-flag" in capsys.readouterr().err
