"""The saves of a run: when one is due, when a signal comes, when there is no room for one.

And which there is to go on from, when another process is lost.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax

from fjax.hosts import any_of, are_several, is_first
from fjax.runs.folder import OpenRun
from fjax.runs.resume import as_tree
from fjax.runs.running import Run
from fjax.runs.steps import Progress
from fjax.training._lock import LOCK_NAME


def save(run: Run, progress: Progress, begun: float, *, last: bool = False) -> None:
    """A checkpoint, found in the records by its step, so that the nearest is kept, too.

    Written in the background, but for the last one of this process. One that cannot be written is
    reported and the run goes on with what it has in memory, if there is another chance.

    Raises:
        OSError: if there is not, or the run is to stop then.
    """
    step = int(progress.state.step)
    tree = as_tree(progress, time.monotonic() - begun)
    _attempt(run, run.checkpoints.wait)  # the one before
    metrics = {"step": float(step)}
    now = partial(run.checkpoints.save, step, tree, metrics=metrics, wait=last)
    _attempt(run, now, last=last)


def _attempt(run: Run, write: Callable[[], None], *, last: bool = False) -> None:
    try:
        write()
    except OSError as error:
        in_use = isinstance(error, BlockingIOError)  # somebody else saves here
        if last or in_use or run.stop_if_unsaved:
            raise
        run.display.warn(
            f"{error} The run goes on, and saves again when that is due; until then the checkpoint "
            f"before is the newest."
        )


def at_once(run: Run, progress: Progress, begun: float) -> AbstractContextManager[None]:
    """Within it a signal ends the run with what there was before, as long as that is still there.

    A step gives it away when its update begins. Several processes stop together, between steps.
    """
    if are_several():
        return nullcontext()
    return run.stop.obeyed_at_once(
        unless=partial(_given_away, progress), save=partial(_save_and_close, run, progress, begun)
    )


def is_stopping(run: Run) -> bool:
    """Whether a signal has come, to this process or to another."""
    run.stop.signal = any_of(run.stop.signal)
    return run.stop.signal != 0


def _given_away(progress: Progress) -> bool:
    """Whether an update has taken the arrays of the state for its own."""
    arrays = (x for x in jax.tree.leaves(progress.state) if isinstance(x, jax.Array))
    return any(array.is_deleted() for array in arrays)


def _save_and_close(run: Run, progress: Progress, begun: float) -> None:
    """All that the end of a run would do, where the process ends without it."""
    save(run, progress, begun, last=True)
    run.checkpoints.close()
    (run.folder / LOCK_NAME).unlink(missing_ok=True)  # the kernel's goes with the process
    run.display.stopped(int(progress.state.step), run.folder)


def after_loss(opened: OpenRun) -> str:
    """How to go on when another process is lost, and this one ends without another word.

    The first gives back what it has locked, which nobody on another host could take over.
    """
    if is_first():
        for folder in (opened.path, opened.checkpoints):
            (folder / LOCK_NAME).unlink(missing_ok=True)
    place = opened.checkpoints
    saved = [int(path.name) for path in place.glob("*") if path.name.isdecimal()]
    what = (
        f"The newest checkpoint in {place} is of step {max(saved)}."
        if saved
        else ("No checkpoint had been saved.")
    )
    return f"{what} To go on, give the same command with --resume, to one process or to several."
