"""The folder of a run: chosen, checked before any work is done, and never written over."""

import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

import fjax
from fjax.training import read_jsonl

MAY_CHANGE = {"steps", "resume", "run_folder", "eval_every", "checkpoint_every", "stop_below", "patience"} | {
    "tensorboard",
    "wandb_project",
    "wandb_mode",
}
"""What --resume may give differently: none of it changes a step that was taken."""


class RunError(Exception):
    """Something the user can put right; printed without a traceback."""


def open_run(config: dict, *, experiment: str, title: str) -> Path:
    """The run's folder, ready to be written to; `describe_run` begins it, once nothing more can be wrong.

    Raises:
        RunError: if it holds another run, there is nothing to resume, or it cannot be written.
    """
    folder = Path(config["run_folder"]) if config["run_folder"] else _default_folder(experiment, title, config["resume"])
    saved = folder / "config.json"
    if config["resume"]:
        _check_same(folder, saved, config)
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty. Add --resume to go on with the run in it, or give another --run-folder.")
    _check_writable(folder)
    return folder


def describe_run(folder: Path, config: dict, *, experiment: str) -> None:
    """config.json of a new run: what was chosen, by which command, and what it ran on."""
    versions = {"fjax": fjax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}
    devices = [jax.devices()[0].device_kind]  # the one that is used, however many there are
    command = shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]])
    written = config | {"versions": versions, "devices": devices, "command": command}
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
        raise RunError(f"{path} is damaged ({error}). Put it back from a copy, or leave its folder out.") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        raise RunError(f"{path} is damaged: it has no {' and no '.join(missing) or 'object in it'}.")
    return found


def read_records(path: Path, *keys: str) -> list[dict]:
    """The records of a file of JSON lines of ours, each with at least these keys.

    Raises:
        OSError: if there is none to be read.
        RunError: if it is damaged.
    """
    try:
        records = read_jsonl(path)
    except (ValueError, AttributeError, RecursionError) as error:  # the second of a line that is no object
        raise RunError(f"{path} is damaged ({error}). Put it back from a copy, or leave its folder out.") from error
    _check_keys(path, records, keys)
    return records


def read_metrics(path: Path) -> list[dict]:
    """The records of metrics.jsonl.

    Raises:
        OSError: if there is none to be read.
        RunError: if it is damaged.
    """
    records = read_records(path, "kind", "step")
    _check_keys(path, [record for record in records if record["kind"] == "evaluation"], ("samples", "seconds"))
    return records


def _check_keys(path: Path, records: list[dict], keys: Sequence[str]) -> None:
    for record in records:
        missing = [key for key in keys if key not in record]
        if missing:
            raise RunError(f"{path} is damaged: a record has no {' and no '.join(missing)} ({record!s:.100}).")


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
    """Refuses to start a run whose checkpoints and export would not fit: 3 float32 copies each, up to 4 of them."""
    needed, free = 4 * (4 * 3 + 1) * parameters + 2**24, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder} has {free / 2**20:.0f} MiB left, but checkpoints and export of this model need about "
            f"{needed / 2**20:.0f} MiB. Free some, or give a --run-folder on another disk."
        )


def _default_folder(experiment: str, title: str, resume: bool) -> Path:
    base = Path("runs") / experiment
    folders = (base / f"{title}-{i}" for i in itertools.count())
    taken = list(itertools.takewhile(lambda folder: folder.exists(), folders))
    if not resume:
        return base / f"{title}-{len(taken)}"
    if not taken:
        raise RunError(f"There is no run {base / title}-* to resume. Leave --resume out, or name it with --run-folder.")
    return taken[-1]


def _check_same(folder: Path, saved: Path, config: dict) -> None:
    if not saved.is_file():
        raise RunError(f"{folder} holds no run to resume (no config.json). Leave --resume out to start one.")
    old = read_json(saved)
    differing = [k for k in config if k not in MAY_CHANGE and old.get(k) != json.loads(json.dumps(config[k]))]
    if differing:
        listed = "; ".join(f"{k}: {old.get(k)!r} there, {config[k]!r} now" for k in differing)
        raise RunError(
            f"{folder} is a run of another configuration ({listed}). Resume it with the same, or start another with a "
            "different --run-folder."
        )


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(2**16))
    except OSError as error:
        raise RunError(f"Cannot write to the run folder {folder}: {error.strerror}. Choose another --run-folder.") from error
