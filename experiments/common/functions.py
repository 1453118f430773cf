"""Functions that a user names on the command line, as module:function: loaded, and called."""

import importlib
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fjax.runs import RunError
from fjax.runs.endings import Interrupted


def load_function(name: str, flag: str) -> Callable:
    """The function of ``module:function``.

    Raises:
        RunError: if it cannot be imported, or is none.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as for a script: what lies where the command is given
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Interrupted:
        raise
    # of the user's module, which may fail in any way, and leave in any way
    except BaseException as error:
        raise RunError(
            f"{flag} {name} cannot be imported, {_shown(error)}. Give it as module:function, from "
            f"the folder that has {module}.py, or put that on PYTHONPATH."
        ) from error
    if not callable(found):
        raise RunError(f"{flag} {name} is {type(found).__name__}, not a function.")
    return found


def call(function: Callable, title: str, on: str, *arguments: object) -> object:
    """What the user's function answers.

    Raises:
        RunError: whatever it raises, ``sys.exit`` included: no run ends with status 0 since a
            reward says so.
    """
    try:
        return function(*arguments)
    except Interrupted:
        raise
    except BaseException as error:
        raise RunError(f"{title} failed on {on}, {_shown(error)}") from error


def _shown(error: BaseException) -> str:
    """The error, and the line that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{type(error).__name__}: {str(error)[:300]} ({place})"


def shown(answer: object) -> str:
    """A value of any kind, in few characters."""
    return reprlib.repr(answer)
