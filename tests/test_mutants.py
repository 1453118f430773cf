"""Every mutant of `make mutants` still applies to the code as it is, and is of code that has to be
right."""

import shutil
import subprocess

import pytest

from tests import mutate
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


@pytest.mark.parametrize(
    ("status", "fate"), [(0, "SURVIVED"), (1, "killed"), (75, "killed"), (-6, "killed")]
)
def test_whoever_ends_the_process_of_its_tests_is_noticed(monkeypatch, status, fate):
    assert _fate_by(monkeypatch, status) == fate


@pytest.mark.parametrize("status", [2, 3, 4, 5])
def test_what_says_nothing_of_a_mutant_is_an_error(monkeypatch, status):
    with pytest.raises(RuntimeError, match="could not run its tests"):
        _fate_by(monkeypatch, status)


def _fate_by(monkeypatch, status):
    """Of a mutant whose tests end so."""
    ended = subprocess.CompletedProcess([], status, stdout="", stderr="")
    monkeypatch.setattr(mutate.subprocess, "run", lambda *args, **options: ended)
    monkeypatch.setattr(mutate, "apply", lambda mutant, root: None)
    monkeypatch.setattr(mutate, "COPIED", ())
    return mutate.fate_of(MUTANTS[0])
