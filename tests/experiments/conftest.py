"""One run is there for all tests that only look at what a run leaves."""

from pathlib import Path
from typing import NamedTuple

import pytest

from experiments.lexical_constraint.__main__ import main
from tests import pictures

from .commands import SMALL, finish


@pytest.fixture(scope="package", autouse=True)
def small_pictures(request):
    """What is on them is looked at in tests/runs; and a second Python, which runs each command once,
    draws them all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pictures.small(monkeypatch, empty=not request.config.getoption("--one-case"))
        yield


class Finished(NamedTuple):
    """A run that has come to its end: to be read, or to be copied."""

    folder: Path
    printed: str
    arguments: tuple


@pytest.fixture(scope="package")
def lexical_run(tmp_path_factory):
    """Four steps towards w9, which about a third of the tiny model's samples have."""
    folder = tmp_path_factory.mktemp("lexical") / "run"
    arguments = ("--word", "w9", *SMALL, "--checkpoint-every", 1)
    printed = finish(main, *arguments, "--steps", 4, "--run-folder", folder)
    return Finished(folder, printed, arguments)
