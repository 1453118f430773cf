"""Where metrics go: a line of JSON a record; TensorBoard and W&B beside it.

The lines are what runs are read back from.

A record is a mapping of names to values. ``step`` says when it is from, and ``kind`` of what it is
(``"step"``, ``"evaluation"``): TensorBoard and W&B group by it, as in ``evaluation/entropy``, and
get its finite numbers alone. Samples of an evaluation go to them as a table.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from fjax import _markdown
from fjax._optional import import_optional

TABLE = "evaluation/samples"
"""What the table of samples is called."""


@runtime_checkable
class Logger(Protocol):
    """Where metrics go: one of those below, or anything of your own with these two methods.

    With ``log_samples`` it is a `SampleLogger` as well, and shows texts.
    """

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record; it has a ``step``."""
        ...

    def close(self) -> None:
        """Called after the last record."""
        ...


@runtime_checkable
class SampleLogger(Protocol):
    """What a logger that shows texts has besides; `FanOut` hands them to those that have it."""

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes some samples of one evaluation.

        Each has ``step``, ``prompt`` where there are prompts, ``text``, and what the target says
        of it.
        """
        ...


class JsonlLogger:
    """Appends records to a file, one JSON object a line.

    A killed process loses none whose ``log`` has returned. JSON has no infinity: non-finite numbers
    are written as the strings ``"inf"``, ``"-inf"`` and ``"nan"``, and texts that read so with an
    apostrophe before them (``"'nan"``). `read_jsonl` turns both back.

    Args:
        path: of the file; made if it is not there. A last line that a kill cut off is dropped, and
            a lost line end mended.
        after_step: records of later steps are dropped first; a resumed run writes them again. None
            keeps all.

    Raises:
        ValueError: if the last line, or with ``after_step`` any, is no record.
    """

    def __init__(self, path: str | Path, *, after_step: int | None = None):
        path = Path(path)
        if after_step is not None and path.exists():
            _keep_until(path, after_step)
        if path.exists():
            _mend_end(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "JsonlLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes one record; arrays of one element become numbers."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes event files for TensorBoard, by tensorboardX.

    Args:
        folder: of the event files; made if it is not there. Give the same one when a run is
            resumed.
        after_step: TensorBoard hides what earlier files of the folder have of later steps; a
            resumed run writes it again. None hides nothing.

    Raises:
        ImportError: if tensorboardX is not installed; it comes with ``fjax[tensorboard]``.
    """

    def __init__(self, folder: str | Path, *, after_step: int | None = None):
        tensorboard = import_optional("tensorboardX", extra="tensorboard")
        resumed = (
            {}
            if after_step is None
            else {"purge_step": after_step + 1, "filename_suffix": f".after-{after_step}"}
        )
        self._writer = tensorboard.SummaryWriter(str(folder), flush_secs=10, **resumed)

    def __enter__(self) -> "TensorBoardLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes the finite numbers of one record; they are on disk some seconds later."""
        for name, number in _numbers(record).items():
            self._writer.add_scalar(name, number, int(record["step"]))

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes texts and what is said of them as a table, under Text."""
        columns, rows = _as_rows(records)
        shown = [[_markdown.as_text(_shown(value)) for value in row] for row in rows]
        page = _markdown.table([*map(_markdown.as_text, columns)], shown)
        self._writer.add_text(TABLE, page, int(records[0]["step"]))

    def close(self) -> None:
        """Writes what is not yet on disk, and closes the file."""
        self._writer.close()


class WandbLogger:
    """Sends metrics to Weights & Biases, or keeps them in a folder for ``wandb sync``.

    Charts are drawn over ``step``. W&B forgets nothing: steps that a resumed run repeats are there
    twice, with the same values where computation is exact.

    Args:
        project: of W&B.
        folder: for W&B's own files; made if it is not there.
        run_id: what W&B knows the run by; up to 128 letters, digits and dashes, unlike that of any
            other run of the project. Keep it, and a resumed run goes on in the same curves.
        name: the title shown; W&B makes one up where it is None.
        config: settings, shown beside the run.
        mode: online needs ``wandb login`` before; offline needs neither network nor account, and
            prints nothing.

    Raises:
        ImportError: if wandb is not installed; it comes with ``fjax[wandb]``.
        RuntimeError: if W&B cannot be reached, or refuses the login or one of the names.
    """

    def __init__(
        self,
        project: str,
        folder: str | Path,
        *,
        run_id: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: Literal["online", "offline"] = "online",
    ):
        wandb = import_optional("wandb", extra="wandb")
        Path(folder).mkdir(parents=True, exist_ok=True)
        # What the program prints stays its own: progress bars are not for a log.
        settings = wandb.Settings(silent=mode == "offline", console="off")
        choices = {
            "project": project,
            "dir": str(folder),
            "id": run_id,
            "name": name,
            "mode": mode,
            "resume": "allow",
        }
        try:
            self._run = wandb.init(**choices, config=dict(config or {}), settings=settings)
        except wandb.Error as error:
            raise RuntimeError(
                f"W&B could not be started: {error} Mode 'offline' needs neither login nor network."
            ) from error
        # An axis of our own, since W&B's must never go back, and a resumed run does.
        self._run.define_metric("*", step_metric="step")
        self._table = wandb.Table

    def __enter__(self) -> "WandbLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands over the finite numbers of one record; they are sent in the background."""
        self._run.log(_numbers(record) | {"step": int(record["step"])})

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hands over texts and what is said of them as a table, one a step."""
        columns, rows = _as_rows(records)
        # Where a feature is known of some texts alone, the others have None.
        table = self._table(columns=columns, data=rows, allow_mixed_types=True)
        self._run.log({TABLE: table, "step": int(records[0]["step"])})

    def close(self) -> None:
        """Ends the run: waits until all is sent.

        A file of offline mode is whole when the process ends.
        """
        self._run.finish()


class FanOut:
    """Several loggers as one.

    Args:
        loggers: each gets every record; closing this closes them all, even if one fails to.
    """

    def __init__(self, loggers: Sequence[Logger]):
        self._loggers = tuple(loggers)

    def __enter__(self) -> "FanOut":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands one record to each."""
        for logger in self._loggers:
            logger.log(record)

    def log_samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Hands samples to each that takes them, as `SampleLogger` has it."""
        for logger in self._loggers:
            if isinstance(logger, SampleLogger):
                logger.log_samples(records)

    def close(self) -> None:
        """Closes each, the last first."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, non-finite numbers restored.

    A last line that was cut off by a kill is left out.

    Raises:
        ValueError: if another line is no record, with its number.
    """
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except ValueError as error:
            if number < len(lines) or not _is_torn(line):
                raise ValueError(
                    f"Line {number} of {path} is not a record, a JSON object: {error}."
                ) from None
    return records


def _is_torn(line: bytes) -> bool:
    """Whether a last line without its end may be the beginning of a record.

    A power cut leaves zeros.
    """
    return line.startswith((b"{", b"\0"))


def _parse(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode())
    if not isinstance(record, dict):
        raise ValueError(f"it is {line[:40].decode(errors='replace')!r}")
    return {key: _restore(value) for key, value in record.items()}


def _keep_until(path: Path, step: int) -> None:
    """Drops the records of later steps, whole or not at all."""
    records = read_jsonl(path)
    odd = [
        record["step"] for record in records if not isinstance(record.get("step", 0), int | float)
    ]
    if odd:
        raise ValueError(f"A record of {path} has the step {odd[0]!r}, which is no number.")
    kept = [record for record in records if record.get("step", 0) <= step]
    replacement = path.with_name(path.name + ".tmp")
    with replacement.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name and none of the content
    replacement.replace(path)


def _mend_end(path: Path) -> None:
    """Nothing is to be written behind half a line.

    So it is dropped, or ended if its end alone is missing.
    """
    with path.open("rb+") as file:
        start, last = _last_line(file)
        if not last or last.endswith(b"\n"):
            return
        try:
            _parse(last.removeprefix(codecs.BOM_UTF8))
        except ValueError as error:
            if not _is_torn(last):
                raise ValueError(
                    f"The last line of {path} is not a record, a JSON object: {error}."
                ) from None
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _last_line(file) -> tuple[int, bytes]:
    """Where it begins and what it is; read from the end, for the file may be long."""
    size = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail[:-1]:
        length = min(2**16, start)
        start = file.seek(start - length)
        tail = file.read(length) + tail
    last = tail[tail[:-1].rfind(b"\n") + 1 :]
    return size - len(last), last


def _line(record):
    return json.dumps(_plain(record)) + "\n"


def _numbers(record):
    """Finite numbers by ``kind/name``; True is 1 and False 0."""
    group = f"{record['kind']}/" if "kind" in record else ""
    values = {
        group + name: _plain(value)
        for name, value in record.items()
        if name not in ("kind", "step")
    }
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}


def _as_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns but for ``step``, and a row a record; None where it has no such value."""
    columns = [*dict.fromkeys(name for record in records for name in record if name != "step")]
    return columns, [[_scalar(record.get(name)) for name in columns] for record in records]


def _scalar(value):
    """As JSON has it, texts as they are; W&B's page reads no infinity."""
    return value if isinstance(value, str) else _plain(value)


def _shown(value) -> str:
    """As a person reads it."""
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _plain(value):
    if isinstance(value, str):
        return f"'{value}" if _UNCLEAR.fullmatch(value) else str(value)
    if isinstance(value, (bool, int)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = np.asarray(value).item()
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


def _restore(value):
    if isinstance(value, str) and _UNCLEAR.fullmatch(value):
        return value[1:] if value.startswith("'") else float(value)
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    return [_restore(item) for item in value] if isinstance(value, list) else value


_UNCLEAR = re.compile("'*(nan|inf|-inf)")
"""What a text must not look like, lest it be taken for a number."""
