"""The folder of a run: chosen, checked before any work is done, and never written over."""

import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import jax

import fjax
from fjax.training import read_jsonl
from fjax.training._lock import LOCK_NAME, FolderLock

MAY_CHANGE = {
    "steps",
    "resume",
    "run_folder",
    "eval_every",
    "checkpoint_every",
    "stop_below",
    "patience",
} | {
    "tensorboard",
    "wandb_project",
    "wandb_mode",
}
"""What --resume may give differently: none of it changes a step that was taken."""


class RunError(Exception):
    """Something the user can put right; printed without a traceback."""


@contextmanager
def open_run(
    config: dict, *, experiment: str, title: str, digests: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """The run's folder, ready to be written to, and nobody else's; `describe_run` begins it, once
    nothing more can be wrong.

    Raises:
        RunError: if it is in use, holds another run, there is nothing to resume, or it cannot be
            written.
    """
    chosen, resume = config["run_folder"], config["resume"]
    folder = Path(chosen) if chosen else (_newest if resume else _make_folder)(experiment, title)
    ours = not chosen or not folder.exists()
    if resume:
        check_same(folder, config)
    _check_writable(folder)
    try:
        with locked(folder):
            if resume:
                check_same(folder, config, digests)
                _check_whole(folder)
            elif _holds_something(folder):
                raise RunError(
                    f"{folder} is not empty. Add --resume to go on with the run in it, or give "
                    f"another --run-folder."
                )
            for left in folder.glob("*.tmp"):  # by a kill in the middle of a write
                left.unlink()
            yield folder
    finally:
        if ours and not resume:
            with suppress(OSError):
                folder.rmdir()  # if nothing was begun


def describe_run(
    folder: Path, config: dict, *, experiment: str, digests: Mapping[str, str]
) -> None:
    """config.json of a new run: what was chosen, by which command, what it ran on, and digests of
    what it reads."""
    versions = {"fjax": fjax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}
    devices = [jax.devices()[0].device_kind]  # the one that is used, however many there are
    command = shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]])
    written = config | {
        "versions": versions,
        "devices": devices,
        "command": command,
        "digests": dict(digests),
    }
    write_text(folder / "config.json", json.dumps(written, indent=2))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path, *keys: str) -> dict:
    """What a file of ours holds, with at least these keys.

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


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl.

    Raises:
        OSError: if there is none to be read.
        RunError: if it is damaged.
    """
    records = read_records(path, "kind", "step")
    _check_keys(
        path,
        [record for record in records if record["kind"] == "evaluation"],
        ("samples", "seconds"),
    )
    return records


def _check_keys(path: Path, records: list[dict], keys: Sequence[str]) -> None:
    for record in records:
        missing = [key for key in keys if key not in record]
        if missing:
            raise RunError(
                f"{path} is damaged: a record has no {' and no '.join(missing)} ({record!s:.100})."
            )


def check_output(path: Path | None, flag: str) -> None:
    """Whether a file can be written there, before there is anything to write.

    Raises:
        RunError: if not.
    """
    if path is None:
        return
    if path.is_dir():
        raise RunError(f"{flag} {path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise RunError(f"There is no folder {path.parent} for {flag} {path}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise RunError(f"{flag} {path} may not be written.")


def check_space(folder: Path, parameters: int) -> None:
    """Refuses to start a run whose checkpoints and export would not fit: 3 float32 copies each, up
    to 4 of them."""
    needed, free = 4 * (4 * 3 + 1) * parameters + 2**24, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder} has {free / 2**20:.0f} MiB left, but checkpoints and export of this model "
            f"need about {needed / 2**20:.0f} MiB. Free some, or give a --run-folder on another "
            f"disk."
        )


def _numbers(base: Path, title: str) -> dict[int, Path]:
    """The folders TITLE-NUMBER, by number."""
    there = base.iterdir() if base.is_dir() else ()
    numbered = {
        path.name.removeprefix(f"{title}-"): path
        for path in there
        if path.name.startswith(f"{title}-")
    }
    return {int(number): path for number, path in numbered.items() if number.isdecimal()}


def _make_folder(experiment: str, title: str) -> Path:
    """A new one, made here and now: two runs that begin at the same moment get one each."""
    base = Path("runs") / experiment
    number = max(_numbers(base, title), default=-1) + 1
    while True:
        folder = base / f"{title}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not base.is_dir():
                raise RunError(
                    f"Cannot write to the run folder {folder}: {base} is no folder."
                ) from None
            number += 1
        except OSError as error:
            raise RunError(
                f"Cannot write to the run folder {folder}: {error.strerror}. Choose a --run-folder."
            ) from error


def _newest(experiment: str, title: str) -> Path:
    """The one with the highest number in which a run has begun."""
    base = Path("runs") / experiment
    begun = {
        number: path
        for number, path in _numbers(base, title).items()
        if (path / "config.json").is_file()
    }
    if not begun:
        raise RunError(
            f"There is no run {base / title}-* to resume. Leave --resume out, or name it with "
            f"--run-folder."
        )
    return begun[max(begun)]


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
            f"Cannot write to the run folder {folder}: {error.strerror}. Choose another "
            f"--run-folder."
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


def check_same(folder: Path, config: dict, digests: Mapping[str, str] | None = None) -> None:
    """Whether the folder's run is of this configuration, and what it reads is still the same.

    Raises:
        RunError: if not, with what differs.
    """
    saved = folder / "config.json"
    if not saved.is_file():
        raise RunError(
            f"{folder} holds no run to resume (no config.json). Leave --resume out to start one."
        )
    old = read_json(saved)
    differing = [
        k for k in config if k not in MAY_CHANGE and old.get(k) != json.loads(json.dumps(config[k]))
    ]
    if differing:
        listed = "; ".join(f"{k}: {old.get(k)!r} there, {config[k]!r} now" for k in differing)
        raise RunError(
            f"{folder} is a run of another configuration ({listed}). Resume it with the same, or "
            f"start another with a "
            "different --run-folder."
        )
    if digests is not None:
        _check_digests(folder, old.get("digests"), digests)


def _check_digests(folder: Path, old: Mapping[str, str] | None, new: Mapping[str, str]) -> None:
    if not isinstance(old, dict):
        print(
            f"{folder} was begun before fjax took digests: whether model, files and functions are "
            f"the same is not checked."
        )
        return
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if changed:
        raise RunError(
            f"{folder} was begun with another content of {', '.join(changed)}. Put back what was "
            f"there, or start another run "
            "with a different --run-folder."
        )


def _check_whole(folder: Path) -> None:
    """Whether what a run has done is still there; going on without would begin it anew, and lose
    what is left."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    taken = last_step(folder)
    advice = f"Put it back, or delete {folder} and begin anew without --resume."
    if taken and not checkpoints.is_dir():
        raise RunError(f"{metrics} has {taken} steps, but {checkpoints} is gone. {advice}")
    if not metrics.is_file() and any(path.name.isdecimal() for path in checkpoints.glob("*")):
        raise RunError(f"{checkpoints} has checkpoints, but {metrics} is gone. {advice}")


def check_none_saved(folder: Path, config: dict) -> None:
    """Whether a run without a checkpoint may have none: it has taken too few steps, and says that
    it begins again.

    Raises:
        RunError: if there must have been one.
    """
    taken, old = last_step(folder), read_json(folder / "config.json")
    every = [
        min(found.get("eval_every", math.inf), found.get("checkpoint_every", math.inf))
        for found in (old, config)
    ]
    # A save begins when it is due, and is whole at the latest when the next one is; how often may
    # have been changed.
    if taken >= 2 * max(every):
        raise RunError(
            f"{folder / 'metrics.jsonl'} has {taken} steps, but no checkpoint of them is left in "
            f"{folder / 'checkpoints'}. Put them back, or delete {folder} and begin anew without "
            f"--resume."
        )
    if taken:
        print(
            f"No checkpoint had been saved when the run was stopped at step {taken}: it begins "
            f"again."
        )


def last_step(folder: Path) -> int:
    """Of metrics.jsonl; 0 if there is none.

    Raises:
        RunError: if the file is damaged.
    """
    path = folder / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
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
            f"Cannot write to the run folder {folder}: {error.strerror}. Choose another "
            f"--run-folder."
        ) from error
