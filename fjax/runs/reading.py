"""What a run has left in its folder, read here and nowhere else."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fjax.training import read_jsonl

METRICS, SAMPLES, CONTEXTS = "metrics.jsonl", "samples.jsonl", "contexts.jsonl"
CHECKPOINTS, MODEL, ADAPTERS = "checkpoints", "model", "adapters"


class RunError(Exception):
    """Something the user can put right; command lines print it without a traceback."""


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


def _check_keys(path: Path, records: list[dict], keys: Sequence[str]) -> None:
    for record in records:
        missing = [key for key in keys if key not in record]
        if missing:
            raise RunError(
                f"{path} is damaged: a record has no {' and no '.join(missing)} ({record!s:.100})."
            )
