"""Digests of what a run reads: model, files, a user's function. A resumed run goes on only where
they are the same."""

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fjax.models import LanguageModel
from fjax.runs.folder import MAY_CHANGE
from fjax.training._digests import describe_arrays, digest_text

from .functions import load_function

FUNCTIONS = ("predicate", "reward", "target")
"""Settings that may be module:function; of a function the file it stands in counts, not what that
imports."""


def input_digests(config, model: LanguageModel, start: LanguageModel | None) -> dict[str, str]:
    """Flag or part of the model -> digest."""
    digests = {"--model": _of_model(model)} | (
        {} if start is None else {"--start": _of_model(start)}
    )
    for flag, path in _paths(config):
        if path.is_file():
            digests[flag] = _of_file(path)
        elif path.is_dir():
            digests[flag] = _of_folder(path)
    return digests


def _paths(config) -> Iterator[tuple[str, Path]]:
    """(flag and value, file or folder) of all that the run reads besides the model."""
    for name, value in _values(config):
        flag = f"--{name.replace('_', '-')} {value}"
        if dataclasses.is_dataclass(value):
            yield from _paths(value)
        elif name in FUNCTIONS and ":" in value:
            source = inspect.getsourcefile(inspect.unwrap(load_function(value, f"--{name}")))
            yield from [] if source is None else [(flag, Path(source))]
        elif name == "reward" and value != "sentiment":
            yield flag, Path(value)
        elif name == "reward_folder" and ("reward", "sentiment") not in _values(config):
            continue
        # The corpora are read to train the reward, whose folder is looked at.
        elif isinstance(value, Path) and name != "corpora" and name not in MAY_CHANGE:
            yield flag, value


def _values(config) -> Iterator[tuple[str, Any]]:
    """(name, value) of every field, and of each value of a field that has several."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            yield field.name, one


def _of_model(model: LanguageModel) -> str:
    parts = {
        "arrays": describe_arrays(model.params),
        "vocabulary": model.tokenizer.get_vocab(),
        "end": model.eos_id,
    }
    return digest_text(json.dumps(parts, sort_keys=True))


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_folder(folder: Path) -> str:
    """Of all files but cards and hidden ones, by name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    shown = {str(path.relative_to(folder)): path for path in files if not path.name.startswith(".")}
    return digest_text(json.dumps({name: _of_file(path) for name, path in shown.items()}))
