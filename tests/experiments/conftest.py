"""Runs of one experiment compile the same programs again and again; here they are compiled once a
test session. And one run is there for all that only look at what a run leaves."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from experiments.lexical_constraint.__main__ import main
from fjax.runs.plots import STYLE

from .commands import SMALL, finish


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have their folders in one of the session's.
    folder = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.02,  # there are many small ones
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # for the processes that tests start
    yield
    del os.environ["JAX_COMPILATION_CACHE_DIR"]
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="package", autouse=True)
def small_pictures():
    """What is on them is looked at in tests/runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(STYLE, "savefig.dpi", 30)
        yield


class Finished(NamedTuple):
    """A run that has come to its end: to be read, or to be copied."""

    folder: Path
    printed: str
    arguments: tuple


@pytest.fixture(scope="package")
def lexical_run(compiled_once, tmp_path_factory):
    """Four steps towards w9, which about a third of the tiny model's samples have."""
    folder = tmp_path_factory.mktemp("lexical") / "run"
    arguments = ("--word", "w9", *SMALL, "--checkpoint-every", 1)
    printed = finish(main, *arguments, "--steps", 4, "--run-folder", folder)
    return Finished(folder, printed, arguments)
