"""Breaks the code on purpose, one line at a time, and says which breaks the tests do not notice:
`make mutants`.

A mutant is a copy of the tree in which one line of `tests/mutants.py` has been applied. The tests
that should see it run on that copy; one that they pass has survived, and shows a test that is
missing. Some minutes; not part of `.ci/run`, where `tests/test_mutants.py` only checks that every
line still applies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("fjax", "experiments", "tests", "docs", "pyproject.toml", "README.md", "Makefile")
COULD_NOT_RUN = {  # nothing collected, say: neither noticed nor survived
    pytest.ExitCode.INTERRUPTED,
    pytest.ExitCode.INTERNAL_ERROR,
    pytest.ExitCode.USAGE_ERROR,
    pytest.ExitCode.NO_TESTS_COLLECTED,
}
LIMIT = 600  # seconds; a mutant that hangs is noticed too, and said to, for a busy machine is slow


def apply(mutant: Mutant, root: Path) -> None:
    """Writes the mutant into a tree.

    Raises:
        ValueError: unless what it replaces stands there exactly once.
    """
    path = root / mutant.path
    source = path.read_text(encoding="utf-8")
    if source.count(mutant.before) != 1:
        raise ValueError(
            f"{mutant.path} has {mutant.before!r} {source.count(mutant.before)} times, not once."
        )
    path.write_text(source.replace(mutant.before, mutant.after), encoding="utf-8")


def fate_of(mutant: Mutant) -> str:
    """What became of it: killed by a test, hung for longer than the limit, or SURVIVED."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
        apply(mutant, copy)
        # Their own PYTHONPATH: an editable install would otherwise give the processes that tests
        # start the whole code. One cache for all: most of a mutant's programs are the code's own.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            *mutant.tests.split(),
        ]
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax"),
        }
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT, text=True
            )
        except subprocess.TimeoutExpired:
            return "hung"
    if done.returncode in COULD_NOT_RUN:
        raise RuntimeError(
            f"{mutant}: pytest could not run its tests.\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    # Any other status is the mutant's: it took the process with it, as code does that ends a host
    # whose peers are lost.
    return "killed" if done.returncode else "SURVIVED"


def main(chosen: list[str]) -> int:
    """Runs those whose description or path has one of the words in it; without any, all."""
    mutants = [
        m for m in MUTANTS if not chosen or any(word in f"{m.path} {m.what}" for word in chosen)
    ]
    fates, begun = Counter(), time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, fate in zip(mutants, pool.map(fate_of, mutants), strict=True):
            print(f"{fate:8}  {mutant.path}: {mutant.what}", flush=True)
            fates[fate] += 1
    print(
        f"{len(mutants)} mutants, {fates['SURVIVED']} survived, {fates['hung']} hung;"
        f" {time.monotonic() - begun:.0f} s."
    )
    return bool(fates["SURVIVED"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
