"""Runs a command in this process, as a shell would: arguments in; exit status and files out."""

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from experiments.common.build import contexts_of, load_model, make_built
from experiments.common.task import Built, Task
from fjax.runs import Display

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
SMALL = (
    "--model",
    TINY,
    "--samples",
    16,
    "--eval-samples",
    32,
    "--max-new-tokens",
    8,
    "--eval-every",
    2,
    "--exact-samples",
    None,
)
"""A model and sizes with which a step takes milliseconds; compiling takes the seconds."""


def run(monkeypatch: pytest.MonkeyPatch, command: Callable[[], int], *arguments: object) -> int:
    """What the command would exit with, such as `experiments.lexical_constraint.__main__.main`."""
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, arguments)])
    try:
        return command()
    except SystemExit as exit:  # tyro's, for what cannot be parsed
        return int(exit.code or 0)


def finish(command: Callable[[], int], *arguments: object) -> str:
    """Runs it to a good end, for all tests that look at what it leaves; returns what it printed."""
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(io.StringIO()) as printed:
        assert run(monkeypatch, command, *arguments) == 0
    return " ".join(printed.getvalue().split())


def build(task: Task, config: Any) -> Built:
    """All that a run of a task does before its first sample: whatever is wrong is raised here."""
    task.make_target(config)
    model = load_model(config.settings)
    built = make_built(config.settings, model, contexts_of(task, config, model), Display())
    if task.make_stepper is not None:
        task.make_stepper(config, built)
    return built
