"""Metrics, a line of JSON a record: appended, flushed, and cut back to the step that a run resumes from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Logger(Protocol):
    """Where metrics go: `JsonlLogger`, or anything of your own with these two methods."""

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
