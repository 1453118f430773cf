"""Every mutant of `make mutants` still applies to the code as it is, and is of code that has to be
right."""

import shutil

import pytest

from tests.mutants import MUTANTS
from tests.mutate import ROOT, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.path}-{mutant.what}")
def test_it_applies(mutant, tmp_path):
    copy = tmp_path / mutant.path
    copy.parent.mkdir(parents=True)
    shutil.copy2(ROOT / mutant.path, copy)
    apply(mutant, tmp_path)
    compile(copy.read_text(encoding="utf-8"), mutant.path, "exec")
    for name in mutant.tests.split():
        assert (ROOT / name.split("::")[0]).exists()


def test_there_are_enough_of_every_kind():
    """Of the mathematics, the sampler, the tuners and the rollouts."""
    of = {
        part: sum(mutant.path.startswith(part) for mutant in MUTANTS)
        for part in ("fjax/sampling", "fjax/training", "fjax/rollouts")
    }
    assert len(MUTANTS) >= 30
    assert min(of.values()) >= 4
