"""What a resumed run goes on with.

Its newest checkpoint or the one that is asked for, and files without what comes again.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fjax.rollouts import Batch
from fjax.runs import folder as folders
from fjax.runs.display import Display
from fjax.runs.folder import OpenRun
from fjax.runs.reading import CONTEXTS, METRICS, SAMPLES, RunError, last_step, read_metrics
from fjax.runs.steps import Progress, Stepper
from fjax.training import Checkpoints, JsonlLogger
from fjax.types import Params


class Schedule(NamedTuple):
    """When a run evaluates, saves and ends."""

    steps: int
    eval_every: int
    eval_samples: int
    checkpoint_every: int
    stop_below: float | None
    patience: int | None


def check_schedule(schedule: Schedule) -> None:
    """Raises a ValueError for a count below 1."""
    counts = {name: value for name, value in schedule._asdict().items() if name != "stop_below"}
    bad = [f"{k}={v}" for k, v in counts.items() if v is not None and not v >= 1]
    if bad:
        raise ValueError(f"Counts must be at least 1, got {', '.join(bad)}.")


def begin_at(
    opened: OpenRun,
    display: Display,
    stepper: Stepper,
    params: Params,
    checkpoints: Checkpoints,
    schedule: Schedule,
    *,
    resume_from: int | None = None,
) -> tuple[Progress, float]:
    """Step 0, the newest checkpoint, or that of the step ``resume_from``.

    Raises:
        RunError: if it cannot be gone on with, with one that can.
    """
    progress = stepper.begin(params)
    if not opened.resume:
        return progress, 0.0
    place, like = opened.checkpoints, as_tree(progress, 0.0)
    step = _chosen(checkpoints.steps, resume_from, place)
    if step is None:
        folders.check_none_saved(opened.path, schedule.eval_every, schedule.checkpoint_every)
        return progress, 0.0
    restored = _restore(place, like, checkpoints, step)
    _set_later_aside(display, checkpoints, step)
    progress = _from_tree(restored, progress)
    step, known = int(progress.state.step), last_step(opened.path)
    if known < step:
        display.warn(
            f"metrics.jsonl ends at step {known}, the checkpoint is of step {step}: what was "
            f"between is lost."
        )
    stepper.go_on(progress)
    return progress, float(restored["seconds"])


def _chosen(there: Sequence[int], resume_from: int | None, place: Path) -> int | None:
    """The step to go on from; None where none was saved yet, and none is asked for."""
    if resume_from is None:
        return max(there, default=None)
    if resume_from not in there:
        raise RunError(
            f"{place} has no checkpoint of step {resume_from}; there are {[*there]}. Give one of "
            f"them as resume_from (--resume-from), or resume=True (--resume) for the newest."
        )
    return resume_from


def _restore(place: Path, like: dict, checkpoints: Checkpoints, step: int) -> dict:
    """That of the step and no other.

    Raises:
        RunError: if it is damaged or not of this run, with what to do.
    """
    try:
        return checkpoints.restore(like, step=step)
    except (OSError, ValueError) as error:
        before = _newest_whole(like, checkpoints, step)
        if before is not None:
            advice = f"To go on from step {before}: resume_from={before} (--resume-from {before})."
        elif isinstance(error, ValueError):
            advice = "Resume with the fjax and the settings that saved it, or start another run."
        else:
            advice = (
                f"All checkpoints of {place.parent} are damaged. Delete it, and begin anew without "
                f"resume=True (--resume)."
            )
        raise RunError(f"{error} {advice}") from error


def _newest_whole(like: dict, checkpoints: Checkpoints, before: int) -> int | None:
    """The newest step before that one which can be restored; None if there is none."""
    for step in reversed([step for step in checkpoints.steps if step < before]):
        with suppress(OSError, ValueError):
            checkpoints.restore(like, step=step)
            return step
    return None


def _set_later_aside(display: Display, checkpoints: Checkpoints, step: int) -> None:
    """What is not gone on from would be taken for the newest the next time."""
    for later in [later for later in checkpoints.steps if later > step]:
        aside = checkpoints.set_aside(later)
        display.warn(f"Going on from step {step}; the checkpoint of step {later} is now {aside}.")


def forget_later(folder: Path, step: int, schedule: Schedule) -> None:
    """Drops what comes again, so that a run in parts is as one in whole.

    That is samples of later steps, from where on the files are only added to, and the evaluation
    that ended a run which now goes on, unless it was due at that step anyway.
    """
    ended = 0 < step < schedule.steps and step % schedule.eval_every > 0
    try:
        for path in (folder / SAMPLES, folder / CONTEXTS):
            if path.exists():
                JsonlLogger(path, after_step=step - ended if step else -1).close()
        path = folder / METRICS
        if ended and path.exists():
            of_step = (r for r in read_metrics(folder) if r["step"] == step)
            taken = [record for record in of_step if record["kind"] == "step"]
            with JsonlLogger(path, after_step=step - 1) as logger:
                for record in taken:
                    logger.log(record)
    except ValueError as error:
        raise RunError(
            f"A file of the run is damaged. {error} Mend or delete that line."
        ) from error


def as_tree(progress: Progress, seconds: float) -> dict[str, Any]:
    """The arrays of a progress, and the seconds that it took."""
    tree: dict[str, Any] = {"state": progress.state, "seconds": np.asarray(seconds)}
    if progress.proposal is not None:
        tree["proposal"] = progress.proposal
    if progress.ahead is not None:
        tree["ahead"] = [x for x in progress.ahead[:-1] if x is not None]
    if progress.staged is not None:
        tree["staged"] = progress.staged
    return tree


def _from_tree(tree: dict, like: Progress) -> Progress:
    ahead = like.ahead
    if ahead is not None:
        arrays = iter(tree["ahead"])
        rows = (None if x is None else next(arrays) for x in ahead[:-1])
        ahead = Batch(*rows, from_policy=ahead.from_policy)
    return Progress(tree["state"], tree.get("proposal"), ahead, tree.get("staged"))
