"""Where metrics go: a line of JSON a record, which is what runs are read back from; TensorBoard and W&B beside it.

A record is a mapping of names to values. ``step`` says when it is from, and ``kind`` of what it is (``"step"``,
``"evaluation"``): TensorBoard and W&B group by it, as in ``evaluation/entropy``, and get its finite numbers alone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from fjax._optional import import_optional


@runtime_checkable
class Logger(Protocol):
    """Where metrics go: one of those below, or anything of your own with these two methods."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Takes one record; it has a ``step``."""
        ...

    def close(self) -> None:
        """No record comes after this."""
        ...


class JsonlLogger:
    """Appends records to a file, one JSON object a line, each on disk before ``log`` returns.

    JSON has no infinity: non-finite numbers are written as the strings ``"inf"``, ``"-inf"`` and ``"nan"``, which
    `read_jsonl` turns back.

    Args:
        path: of the file; made if it is not there.
        after_step: records of later steps are dropped first; a resumed run writes them again. None keeps all.
    """

    def __init__(self, path: str | Path, *, after_step: int | None = None):
        path = Path(path)
        if after_step is not None and path.exists():
            kept = [record for record in read_jsonl(path) if record.get("step", 0) <= after_step]
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(_line(record) for record in kept))
            replacement.replace(path)
        self._file = path.open("a")

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
        folder: of the event files; made if it is not there. Give the same one when a run is resumed.
        after_step: TensorBoard hides what earlier files of the folder have of later steps; a resumed run writes it again.
            None hides nothing.

    Raises:
        ImportError: if tensorboardX is not installed; it comes with ``fjax[tensorboard]``.
    """

    def __init__(self, folder: str | Path, *, after_step: int | None = None):
        tensorboard = import_optional("tensorboardX", extra="tensorboard")
        resumed = {} if after_step is None else {"purge_step": after_step + 1, "filename_suffix": f".after-{after_step}"}
        self._writer = tensorboard.SummaryWriter(str(folder), flush_secs=10, **resumed)

    def __enter__(self) -> "TensorBoardLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Writes the finite numbers of one record; they are on disk some seconds later."""
        for name, number in _numbers(record).items():
            self._writer.add_scalar(name, number, int(record["step"]))

    def close(self) -> None:
        """Writes what is not yet on disk, and closes the file."""
        self._writer.close()


class WandbLogger:
    """Sends metrics to Weights & Biases, or keeps them in a folder for ``wandb sync``.

    Charts are drawn over ``step``. W&B forgets nothing: steps that a resumed run repeats are there twice, with the same
    values where computation is exact.

    Args:
        project: of W&B.
        folder: for W&B's own files; made if it is not there.
        run_id: what W&B knows the run by; up to 128 letters, digits and dashes, unlike that of any other run of the project.
            Keep it, and a resumed run goes on in the same curves.
        name: the title shown; W&B makes one up where it is None.
        config: settings, shown beside the run.
        mode: online needs ``wandb login`` before; offline needs neither network nor account, and prints nothing.

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
        choices = {"project": project, "dir": str(folder), "id": run_id, "name": name, "mode": mode, "resume": "allow"}
        try:
            self._run = wandb.init(**choices, config=dict(config or {}), settings=settings)
        except wandb.Error as error:
            raise RuntimeError(f"W&B could not be started: {error} Mode 'offline' needs neither login nor network.") from error
        # An axis of our own, since W&B's must never go back, and a resumed run does.
        self._run.define_metric("*", step_metric="step")

    def __enter__(self) -> "WandbLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands over the finite numbers of one record; they are sent in the background."""
        self._run.log(_numbers(record) | {"step": int(record["step"])})

    def close(self) -> None:
        """Ends the run: waits until all is sent; a file of offline mode is whole when the process ends."""
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

    def close(self) -> None:
        """Closes each, the last first."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, non-finite numbers restored. A last line that was cut off by a kill is left out."""
    records = []
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"Line {number} of {path} is not JSON: {error}.") from error
        records.append({key: _restore(value) for key, value in record.items()})
    return records


def _line(record):
    return json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"


def _numbers(record):
    """Finite numbers by ``kind/name``; True is 1 and False 0."""
    group = f"{record['kind']}/" if "kind" in record else ""
    values = {group + name: _plain(value) for name, value in record.items() if name not in ("kind", "step")}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}


def _plain(value):
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = np.asarray(value).item()
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return number


def _restore(value):
    return float(value) if value in ("inf", "-inf", "nan") else value
