"""Functions that a user names on the command line, as module:function: loaded, called, and what
they ask for."""

import importlib
import inspect
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


def call(function: Callable, title: str, on: str, *arguments: object, **named: object) -> object:
    """What the user's function answers.

    Raises:
        RunError: whatever it raises, ``sys.exit`` included: no run ends with status 0 since a
            reward says so.
    """
    try:
        return function(*arguments, **named)
    except Interrupted:
        raise
    except BaseException as error:
        raise RunError(f"{title} failed on {on}, {_shown(error)}") from error


class Taken(NamedTuple):
    """What a function asks for.

    leading: names of the parameters that have no default, and can be given by position.
    names: of all that can be given by name.
    needed: those of them that have no default.
    anything: whether it takes any other name, too.
    """

    leading: tuple[str, ...]
    names: tuple[str, ...]
    needed: tuple[str, ...]
    anything: bool


def taken_by(function: Callable) -> Taken:
    """What a function asks for; of one that does not say, one thing by position.

    >>> taken_by(lambda prompts, completions, *, answer=None, **others: None)[2:]
    (('prompts', 'completions'), True)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some that are written in C
        return Taken(("texts",), (), (), False)
    P = inspect.Parameter
    needed = [p for p in parameters if p.default is p.empty]
    leading = (p.name for p in needed if p.kind in (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD))
    names, without = (
        tuple(p.name for p in some if p.kind in (P.POSITIONAL_OR_KEYWORD, P.KEYWORD_ONLY))
        for some in (parameters, needed)
    )
    return Taken(tuple(leading), names, without, any(p.kind is P.VAR_KEYWORD for p in parameters))


def _shown(error: BaseException) -> str:
    """The error, and the line that raised it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return f"{type(error).__name__}: {str(error)[:300]} ({place})"


def shown(answer: object) -> str:
    """A value of any kind, in few characters."""
    return reprlib.repr(answer)
