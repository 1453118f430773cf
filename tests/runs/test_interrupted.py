"""What a signal costs in each phase, what a full disk does, and where a run goes on from when told to."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from contextlib import suppress

import jax.numpy as jnp
import numpy as np
import pytest

from fjax.runs import RunError, evaluating, loop, read_metrics, steps
from fjax.runs.reading import is_finished
from fjax.training import Checkpoints
from fjax.training._record import sealed
from tests import bigram, fault_loop
from tests.runs.test_loop import own_stepper, records, run, said
from tests.seconds_to_save import deaf

APART = {"steps": 5, "eval_every": 100, "checkpoint_every": 100}
"""A run that saves at its end alone, or at a signal."""


def at_call(function, number):
    """The function, and SIGTERM before the call of that number, once."""
    calls = []

    def called(*given, **options):
        calls.append(number)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return function(*given, **options)

    return called


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, proposal_every=2, **APART).status == 0
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        (steps, "score_batch", 3, 2),  # drawn, and not yet scored
        (steps, "to_rollout", 3, 2),  # before the update takes the state for its own
        (steps, "as_record", 3, 3),  # from when on there is no way back
        (evaluating, "measure", 2, 5),
        (loop, "_export", 1, 5),
        (loop.plots, "write", 1, 5),
    ],
)
def test_a_signal_ends_a_run_at_once_and_costs_nothing(
    owner, name, call, saved, whole, tmp_path, monkeypatch
):
    """The step that it falls into is taken again, unless its update has begun."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at_call(getattr(owner, name), call))
        result = run(folder, proposal_every=2, **APART)
    assert (result.status, result.step) == (143, saved)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps == [saved]
    assert not (folder / "lock").exists()
    assert run(folder, proposal_every=2, resume=True, **APART).status == 0
    assert records(folder) == records(whole)
    assert (folder / "model" / "table.npy").read_bytes() == (
        whole / "model" / "table.npy"
    ).read_bytes()


def goes_deaf(folder):
    """A process that hears nothing in its fourth step, as within a compiler."""
    stepper = own_stepper()

    def step(progress, number):
        if number == 3:
            folder.with_name("deaf").touch()
            deaf(300)
        return stepper.step(progress, number)

    result = run(folder, stepper._replace(step=step), **APART)
    os._exit(result.status)


def test_a_signal_that_python_does_not_hear_is_obeyed_by_another_thread(tmp_path):
    """Seconds after it, everything is saved, no lock is left, and the process is gone."""
    folder = tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fjax.runs", "tests.bigram"])
    process = context.Process(target=goes_deaf, args=(folder,))
    process.start()
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "deaf").exists():
            assert time.monotonic() < deadline
            assert process.exitcode is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 143
    finally:
        process.kill()
    assert not (folder / "lock").exists()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps == [3]
    assert run(folder, own_stepper(), resume=True, **APART).status == 0
    taken = [r["step"] for r in read_metrics(folder) if r["kind"] == "step"]
    assert taken == [1, 2, 3, 4, 5]


def test_runs_that_are_killed_end_as_one_that_never_was(tmp_path):
    """A short version of `python -m tests.fault_loop`."""
    kills = fault_loop.loop(tmp_path, kills=2, seed=1)
    assert {kill.kind for kill in kills} == {"adaptive", "staged"}


# --- another checkpoint than the newest


@pytest.fixture
def finished(tmp_path):
    """A run with checkpoints of steps 4 and 5, and maybe of 2."""
    folder = tmp_path / "run"
    assert run(folder, own_stepper(), steps=5).status == 0
    return folder


def damage(folder, step):
    (folder / "checkpoints" / str(step) / "tree" / "manifest.ocdbt").write_bytes(b"")


def test_a_damaged_newest_checkpoint_is_refused_and_the_one_before_is_offered(finished):
    damage(finished, 5)
    with pytest.raises(
        RunError,
        match=r"checkpoint of step 5 in .* is damaged: .* To go on from step 4: resume_from=4 "
        r"\(--resume-from 4\)",
    ):
        run(finished, own_stepper(), steps=5, resume=True)
    assert (finished / "checkpoints" / "5").is_dir()
    damage(finished, 4)  # nor is what is damaged offered
    there = sorted(int(p.name) for p in (finished / "checkpoints").glob("[0-9]*"))
    with pytest.raises(RunError) as raised:
        run(finished, own_stepper(), steps=5, resume=True)
    if there[0] < 4:
        assert f"(--resume-from {there[0]})" in str(raised.value)
    else:
        assert f"All checkpoints of {finished} are damaged" in str(raised.value)


def test_a_run_goes_on_from_the_step_that_it_is_told(finished, capsys):
    """To the same end; what comes again is nowhere twice, and what came later is out of the way."""
    before, samples = records(finished), (finished / "samples.jsonl").read_bytes()
    damage(finished, 5)
    assert run(finished, own_stepper(), steps=5, resume_from=4).status == 0
    aside = finished / "checkpoints" / "aside-5"
    assert f"Going on from step 4; the checkpoint of step 5 is now {aside}" in said(capsys)
    assert aside.is_dir()
    assert records(finished) == before
    assert (finished / "samples.jsonl").read_bytes() == samples


def test_a_step_that_was_not_saved_cannot_be_gone_on_from(finished):
    with pytest.raises(RunError, match=r"no checkpoint of step 3; there are \[.*4, 5\]"):
        run(finished, own_stepper(), steps=5, resume_from=3)


def rewrite_record(folder, step, without=(), **changes):
    """As another fjax or another run would have left it: with a digest that is right."""
    path = folder / "checkpoints" / str(step) / "record" / "data.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(sealed({k: v for k, v in found.items() if k not in without})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format": 2, "versions": {"fjax": "9.1", "jax": "1.0"}},
            r"was saved in format 2 by fjax 9\.1; this is fjax .*, which reads formats up to 1",
        ),
        ({"about": {"seed": 7}}, r"is of another run \(.*seed: 7 there, 0 here"),
    ],
    ids=("newer", "foreign"),
)
def test_a_newer_or_foreign_checkpoint_says_what_differs(finished, changes, message):
    rewrite_record(finished, 5, **changes)
    with pytest.raises(RunError, match=f"step 5 in .* {message}.*To go on from step 4"):
        run(finished, own_stepper(), steps=5, resume=True)


def test_a_checkpoint_that_says_less_of_itself_is_gone_on_with(finished):
    """As those of fjax 0.1 before it had an about."""
    rewrite_record(finished, 5, without=("format", "versions", "about"))
    assert run(finished, own_stepper(), steps=6, resume=True).status == 0


def test_another_tree_of_another_fjax_is_told_by_their_versions(finished):
    rewrite_record(finished, 5, versions={"fjax": "0.0.1", "jax": "0.5"})
    message = r"state.* is there.*\. It was saved by fjax 0\.0\.1 with jax 0\.5, and this is fjax"
    with (
        Checkpoints(finished / "checkpoints") as checkpoints,
        pytest.raises(ValueError, match=message),
    ):
        checkpoints.restore({"seconds": np.zeros(())})


def test_a_checkpoint_of_another_run_of_the_same_shapes_is_refused(finished, tmp_path):
    other = tmp_path / "other"
    assert run(other, own_stepper(), steps=5, seed=1).status == 0
    shutil.rmtree(finished / "checkpoints" / "5")
    shutil.copytree(other / "checkpoints" / "5", finished / "checkpoints" / "5")
    with pytest.raises(RunError, match=r"is of another run \(seed: 1 there, 0 here\)"):
        run(finished, own_stepper(), steps=5, resume=True)


# --- a full disk


class Disk:
    """No file may be larger than 64 KiB while it is full, as a full one would have it."""

    def __init__(self):
        self.before, self.writing = resource.getrlimit(resource.RLIMIT_FSIZE), None

    def open(self, *given, **options):
        self.writing = Checkpoints(*given, **options)
        return self.writing

    def fill(self, full):
        """Once what is being written is there, or has failed."""
        pending = None if self.writing is None else self.writing._pending
        with suppress(Exception):  # the run's to hear of
            None if pending is None else pending.result()
        limit = (2**16, self.before[1]) if full else self.before
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.fixture
def disk(monkeypatch):
    there = Disk()
    monkeypatch.setattr(loop, "Checkpoints", there.open)
    yield there
    there.fill(False)


LARGE = np.random.default_rng(0).normal(size=(400, 400)).astype(np.float32)


def run_while_full(folder, disk, full, **options):
    """Steps of which those in ``full`` find the disk so; the trained table has 640 kB."""
    stepper = own_stepper()

    def step(progress, number):
        disk.fill(number + 1 in full)
        return stepper.step(progress, number)

    options = {"steps": 6, "eval_every": 100, "checkpoint_every": 2} | options
    return run(
        folder,
        stepper._replace(step=step),
        initial=LARGE,
        policy_of=lambda table: table[: bigram.WORDS, : bigram.WORDS],
        **options,
    )


def test_a_full_disk_is_reported_and_the_run_goes_on(tmp_path, disk, capsys):
    """With what it has in memory, and the next checkpoint is saved where there is room again."""
    folder = tmp_path / "run"
    assert run_while_full(folder, disk, {4}).status == 0
    printed = said(capsys)
    assert "A checkpoint could not be written" in printed
    assert "File too large. The run goes on" in printed
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["2", "6"]
    assert is_finished(folder)


def test_a_full_disk_ends_the_run_where_that_is_asked_for(tmp_path, disk):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match=r"could not be written to .*: File too large"):
        run_while_full(folder, disk, {4, 5, 6}, stop_if_unsaved=True)
    disk.fill(False)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps == [2]
        saved = checkpoints.restore({"state": own_state(), "seconds": np.zeros(())})
    assert int(saved["state"].step) == 2


def own_state():
    return own_stepper().begin(jnp.asarray(LARGE)).state


def test_a_full_disk_at_the_end_is_an_error_in_any_case(tmp_path, disk):
    """What is not saved then is lost, and nobody may think otherwise."""
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="could not be written"):
        run_while_full(folder, disk, {5, 6})
    disk.fill(False)
    assert run_while_full(folder, disk, set(), resume=True).status == 0
    assert [r["step"] for r in read_metrics(folder) if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
