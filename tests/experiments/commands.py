"""Runs an experiment's command in this process, as a shell would: arguments in; exit status and
files out."""

import sys
from collections.abc import Callable
from pathlib import Path

from experiments import _command

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
)
"""A model and sizes with which a step takes milliseconds; compiling takes the seconds."""


def run(monkeypatch, config: type, main: Callable, *arguments: object) -> int:
    """What ``python -m <experiment> <arguments>`` would exit with."""
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, arguments)])
    try:
        return _command.run(config, main, module="experiment")
    except SystemExit as exit:  # tyro's, for what cannot be parsed
        return int(exit.code or 0)
