"""The folder of a run, read here and nowhere else.

It is chosen, checked before any work is done, and never written over.
"""

import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax

import fjax
from fjax._trees import count_numbers
from fjax.hosts import agree, is_first, say
from fjax.runs.aim import Aim
from fjax.sharding import devices_of
from fjax.training import read_jsonl
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

METRICS, SAMPLES, CONTEXTS = "metrics.jsonl", "samples.jsonl", "contexts.jsonl"
CHECKPOINTS, MODEL, ADAPTERS = "checkpoints", "model", "adapters"


class RunError(Exception):
    """Something the user can put right; command lines print it without a traceback."""


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
            written.
    """
    path, config = Path(folder), dict(config or {})
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
        yield OpenRun(own, config, digests, resume, "", path)


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


def read_json(path: Path, *keys: str) -> dict:
    """The JSON object in a file of ours, with at least these keys.

    Raises:
        OSError: if there is none to be read.
        RunError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Put it back from a copy, or leave its folder out."
        ) from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        raise RunError(
            f"{path} is damaged: it has no {' and no '.join(missing) or 'object in it'}."
        )
    return found


def read_records(path: Path, *keys: str) -> list[dict]:
    """The records of a file of JSON lines of ours, each with at least these keys.

    Raises:
        OSError: if there is none to be read.
        RunError: if it is damaged.
    """
    try:
        records = read_jsonl(path)
    # the second of a line that is no object
    except (ValueError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Put it back from a copy, or leave its folder out."
        ) from error
    _check_keys(path, records, keys)
    return records


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's steps and evaluations, in the order in which they were written.

    Raises:
        RunError: if it is damaged, or there is none.
    """
    with _of_a_run(folder):
        records = read_records(folder / METRICS, "kind", "step")
        found = [record for record in records if record["kind"] == "evaluation"]
        _check_keys(folder / METRICS, found, ("samples", "seconds"))
        return records


def read_config(folder: Path, *keys: str) -> dict:
    """What a run was begun with.

    Raises:
        RunError: if it is damaged, or there is none.
    """
    with _of_a_run(folder):
        return read_json(folder / "config.json", *keys)


@contextmanager
def _of_a_run(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder} is no run folder: {error.strerror}: {error.filename}.") from error


def by_step(records: Sequence[dict], kind: str) -> dict[int, dict]:
    """The records of a kind, "step" or "evaluation", by step and in its order.

    Where a resumed run repeated one, the later, which is the one that went on.
    """
    found = {record["step"]: record for record in records if record["kind"] == kind}
    return dict(sorted(found.items()))


def read_evaluations(folder: Path) -> list[dict]:
    """The evaluations of a run, the first (the base model's) to the last.

    Raises:
        RunError: if there is none.
    """
    found, _ = read_figures(folder)
    return found


def read_figures(folder: Path) -> tuple[list[dict], dict | None]:
    """The evaluations of a run, and figures of samples of p itself, None where it had none.

    Raises:
        RunError: if there is no evaluation.
    """
    records = read_metrics(folder)
    found = by_step(records, "evaluation")
    if not found:
        raise RunError(f"{folder} has no evaluation yet.")
    return list(found.values()), of_target(records)


def of_target(records: Sequence[dict]) -> dict | None:
    """Figures of samples of p itself, among the records of a run; None where it had none."""
    return next(iter(by_step(records, "target").values()), None)


def read_samples(folder: Path) -> list[dict]:
    """Texts of all evaluations, each with its step and features."""
    with _of_a_run(folder):
        return read_records(folder / SAMPLES, "step", "text")


def read_contexts(folder: Path) -> list[dict]:
    """Means of each prompt, of those whose Z is known; [] for a run without prompts."""
    path = folder / CONTEXTS
    records = read_records(path, "step", "prompt", "log_z") if path.is_file() else []
    known = [record for record in records if math.isfinite(record["log_z"])]
    return known or records


def is_begun(folder: Path) -> bool:
    """Whether there is something to resume."""
    return (folder / "config.json").is_file()


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end.

    The aligned model is the last thing that it writes but its pictures.
    """
    return is_begun(folder) and (folder / MODEL).is_dir()


def current_step(folder: Path) -> int:
    """The step of the last record of a run that may be going on.

    Its file may be long, so only its end is read.
    """
    path = folder / METRICS
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**15))
        found = re.findall(rb'"step": (\d+),', file.read())
    return int(found[-1]) if found else 0


def _check_keys(path: Path, records: list[dict], keys: Sequence[str]) -> None:
    for record in records:
        missing = [key for key in keys if key not in record]
        if missing:
            raise RunError(
                f"{path} is damaged: a record has no {' and no '.join(missing)} ({record!s:.100})."
            )


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
    differing = [
        k for k in config if k not in MAY_CHANGE and old.get(k) != json.loads(json.dumps(config[k]))
    ]
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


def last_step(folder: Path) -> int:
    """Of metrics.jsonl; 0 if there is none.

    Raises:
        RunError: if the file is damaged.
    """
    path = folder / METRICS
    records = read_metrics(folder) if path.is_file() else []
    try:
        return max(
            (int(record["step"]) for record in records if record["kind"] == "step"), default=0
        )
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: a step is no number ({error}).") from error


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
