"""The folder of a run: opened, checked before any work is done, and never written over."""

import json
import math
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax

import fjax
from fjax._trees import count_numbers
from fjax.hosts import agree, from_first, is_first, say
from fjax.runs.aim import Aim
from fjax.runs.reading import (  # noqa: F401 - they were here before
    ADAPTERS,
    CHECKPOINTS,
    CONTEXTS,
    METRICS,
    MODEL,
    SAMPLES,
    RunError,
    by_step,
    current_step,
    is_begun,
    is_finished,
    last_step,
    of_target,
    read_config,
    read_contexts,
    read_evaluations,
    read_figures,
    read_json,
    read_metrics,
    read_records,
    read_samples,
)
from fjax.sharding import devices_of
from fjax.training._lock import LOCK_NAME, FolderLock
from fjax.types import Params

MAY_CHANGE = {
    *("mesh", "distributed", "coordinator", "processes", "process", "dry_run"),
    "lora_merge",  # the same policy, up to rounding
    "corpora",  # what a reward was trained on; the reward itself is looked at
    "steps",
    *("resume", "resume_from", "stop_if_unsaved"),
    "run_folder",
    "eval_every",
    *("exact_samples", "exact_draws", "exact_folder"),  # what it is measured by
    "checkpoint_every",
    "stop_below",
    "patience",
    "tensorboard",
    "wandb_project",
    "wandb_mode",
}
"""What a resumed run may be given differently: none of it changes a step that was taken."""


OWN = {
    *("distributed", "coordinator", "processes", "process"),
    *("run_folder", "exact_folder", "reward_folder", "corpora", "model", "start"),
}
"""What each of several processes may be given differently: its number, and where it finds what."""


class OpenRun(NamedTuple):
    """A run's folder, held by this process, and what is to be written about the run.

    Attributes:
        path: the folder.
        config: what was chosen, as plain values.
        digests: of what the run reads.
        resume: whether it goes on.
        command: what would start it again.
        shared: the folder of the run where ``path`` is this process's own, see `open_run`.
    """

    path: Path
    config: Mapping[str, object]
    digests: Mapping[str, str]
    resume: bool
    command: str
    shared: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Where all processes save together."""
        return (self.shared or self.path) / CHECKPOINTS


@contextmanager
def open_run(
    folder: str | Path,
    config: Mapping[str, object] | None = None,
    *,
    resume: bool = False,
    digests: Mapping[str, str] | None = None,
    command: str | None = None,
    ours: bool = False,
) -> Iterator[OpenRun]:
    """Opens a run's folder for this process alone, ready to be written to.

    `describe_run` begins it, once nothing more can be wrong. Of several processes the first has the
    folder; each of the others writes what the first does into a folder of its own, which goes when
    it ends, and all save their part of the checkpoints into the one.

    Args:
        folder: made if it is not there.
        config: what was chosen, as plain values; a resumed run must have been begun with the same,
            but for `MAY_CHANGE`.
        resume: go on with what is there.
        digests: of what the run reads; a resumed run must find the same.
        command: for the report; None takes this process's.
        ours: whether the folder was made for this run, and is deleted if the run is not begun.

    Raises:
        RunError: if it is in use, holds another run, there is nothing to resume, or it cannot be
            written; of several processes, if they were given different things, or not all see it.
    """
    path, config = Path(folder), dict(config or {})
    _check_alike(config, digests or {})
    if not is_first():
        with _open_aside(path, config, digests or {}, resume) as opened:
            yield opened
        return
    ours = ours or not path.exists()
    if resume:
        check_same(path, config)
    _check_writable(path)
    try:
        with locked(path):
            if resume:
                check_same(path, config, digests)
                _check_whole(path)
            elif _holds_something(path):
                raise RunError(
                    f"{path} is not empty. Give resume=True (--resume) to go on with the run in "
                    f"it, or another folder (--run-folder)."
                )
            for left in path.glob("*.tmp"):  # by a kill in the middle of a write
                left.unlink()
            said = shlex.join(["python", *sys.argv]) if command is None else command
            agree(True)  # it is open, and the others have their copies
            yield OpenRun(path, config, digests or {}, resume, said)
    finally:
        if ours and not resume:
            with suppress(OSError):
                path.rmdir()  # if nothing was begun


@contextmanager
def _open_aside(
    path: Path, config: Mapping[str, object], digests: Mapping[str, str], resume: bool
) -> Iterator[OpenRun]:
    with tempfile.TemporaryDirectory(prefix="fjax-") as aside:
        own = Path(aside)
        if resume:
            check_same(path, config, digests)
            for name in (METRICS, SAMPLES, CONTEXTS, "config.json"):
                if (path / name).exists():
                    shutil.copy(path / name, own / name)
        agree(True)
        if not (path / LOCK_NAME).exists():
            raise RunError(
                f"{path.absolute()} on {socket.gethostname()} is not the run folder that the first "
                f"process has opened. Give all processes one that their hosts share (--run-folder)."
            )
        yield OpenRun(own, config, digests, resume, "", path)


def _check_alike(config: Mapping[str, object], digests: Mapping[str, str]) -> None:
    """Whether all processes do the same: they would wait for one another for ever."""
    mine = {name: value for name, value in config.items() if name not in OWN}
    mine = json.loads(json.dumps(mine | {f"contents of {k}": v for k, v in digests.items()}))
    first = json.loads(from_first(json.dumps(mine)))
    differing = [
        f"{name}: {first.get(name)!r} there, {mine.get(name)!r} here"
        for name in {**first, **mine}
        if first.get(name) != mine.get(name)
    ]
    if differing:
        raise RunError(
            f"This process was given something else than the first one ({'; '.join(differing)}). "
            f"Give all of them the same command, but for --process."
        )


def describe_run(run: OpenRun, aim: Aim = Aim(), *, params: Params = ()) -> None:
    """Writes config.json of a new run.

    What was chosen, by which command, what it is after, what it ran on, and digests of what it
    reads.
    """
    versions = {"fjax": fjax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}
    devices = [device.device_kind for device in devices_of(params)]
    about = {"versions": versions, "devices": devices, "command": run.command, "aim": aim._asdict()}
    written = {**run.config, **about, "digests": dict(run.digests)}
    write_text(run.path / "config.json", json.dumps(written, indent=2))


def identity(run: OpenRun) -> dict[str, object]:
    """What a checkpoint must agree with to be one of this run: what may not change."""
    fixed = {name: value for name, value in run.config.items() if name not in MAY_CHANGE}
    return fixed | {f"contents of {name}": digest for name, digest in run.digests.items()}


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check_space(folder: Path, trained: Params, exported: Params) -> None:
    """Refuses to start a run whose checkpoints and export would not fit.

    A checkpoint has 3 float32 copies of what is trained, and there are up to 4 of them.
    """
    numbers = 4 * 3 * count_numbers(trained) + count_numbers(exported)
    needed, free = 4 * numbers + 2**24, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder} has {free / 2**20:.0f} MiB left, but checkpoints and export of this model "
            f"need about {needed / 2**20:.0f} MiB. Free some, or give a folder on another "
            f"disk (--run-folder)."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, nobody else writes there.

    Raises:
        RunError: if another process does, or the lock cannot be written.
    """
    try:
        lock = FolderLock(folder)
    except BlockingIOError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        raise RunError(
            f"Cannot write to the run folder {folder}: {error.strerror}. Give another folder "
            f"(--run-folder)."
        ) from error
    try:
        if lock.taken_over is not None:
            print(
                f"{folder} was in use by process {lock.taken_over}, which is gone; this run takes "
                f"it over."
            )
        yield
    finally:
        lock.release()


def _holds_something(folder: Path) -> bool:
    return any(path.name != LOCK_NAME and path.suffix != ".tmp" for path in folder.iterdir())


def check_same(
    folder: Path, config: Mapping[str, object], digests: Mapping[str, str] | None = None
) -> None:
    """Whether the folder's run is of this configuration, and what it reads is still the same.

    Raises:
        RunError: if not, with what differs.
    """
    saved = folder / "config.json"
    if not saved.is_file():
        raise RunError(
            f"{folder} holds no run to resume (no config.json). Leave resume=True (--resume) out "
            f"to start one."
        )
    old = read_json(saved)
    # An option that fjax did not have then was off.
    asked = {k: v for k, v in config.items() if k not in MAY_CHANGE and (k in old or v)}
    differing = [k for k, v in asked.items() if old.get(k) != json.loads(json.dumps(v))]
    if differing:
        listed = "; ".join(f"{k}: {old.get(k)!r} there, {config[k]!r} now" for k in differing)
        raise RunError(
            f"{folder} is a run of another configuration ({listed}). Resume it with the same, or "
            f"start another in a folder of its own (--run-folder)."
        )
    if digests is not None:
        _check_digests(folder, old.get("digests"), digests)


def _check_digests(folder: Path, old: Mapping[str, str] | None, new: Mapping[str, str]) -> None:
    if not isinstance(old, dict):
        say(
            f"{folder} was begun before fjax took digests: whether model, files and functions are "
            f"the same is not checked."
        )
        return
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        raise RunError(
            f"{folder} was begun with different contents of {', '.join(changed)}. Put back what "
            f"was there, or start another run in a folder of its own (--run-folder)."
        )


def _check_whole(folder: Path) -> None:
    """Whether what a run has done is still there.

    Going on without would begin it anew, and lose what is left.
    """
    checkpoints, metrics = folder / CHECKPOINTS, folder / METRICS
    taken = last_step(folder)
    advice = f"Put it back, or delete {folder} and begin anew without resume=True (--resume)."
    if taken and not checkpoints.is_dir():
        raise RunError(f"{metrics} has {taken} steps, but {checkpoints} is gone. {advice}")
    if not metrics.is_file() and any(path.name.isdecimal() for path in checkpoints.glob("*")):
        raise RunError(f"{checkpoints} has checkpoints, but {metrics} is gone. {advice}")


def check_none_saved(folder: Path, eval_every: int, checkpoint_every: int) -> None:
    """Whether a run without a checkpoint may have none.

    It may if it has taken too few steps, and says that it begins again.

    Raises:
        RunError: if there must have been one.
    """
    taken, old = last_step(folder), read_json(folder / "config.json")
    before = min(old.get("eval_every", math.inf), old.get("checkpoint_every", math.inf))
    every = before, min(eval_every, checkpoint_every)
    # A save begins when it is due, and is whole at the latest when the next one is; how often may
    # have been changed.
    if taken >= 2 * max(every):
        raise RunError(
            f"{folder / METRICS} has {taken} steps, but no checkpoint of them is left in "
            f"{folder / CHECKPOINTS}. Put them back, or delete {folder} and begin anew without "
            f"resume=True (--resume)."
        )
    if taken:
        say(
            f"No checkpoint had been saved when the run was stopped at step {taken}: it begins "
            f"again."
        )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(2**16))
    except OSError as error:
        raise RunError(
            f"Cannot write to the run folder {folder}: {error.strerror}. Give another folder "
            f"(--run-folder)."
        ) from error
