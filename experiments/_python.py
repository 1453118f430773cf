"""Functions that a user names on the command line, as module:function."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from ._run_folder import RunError


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
    except Exception as error:  # of the user's module, which may fail in any way
        raise RunError(
            f"{flag} {name} cannot be imported, {type(error).__name__}: {error}. Give it as module:function, from the folder "
            f"that has {module}.py, or put that on PYTHONPATH."
        ) from error
    if not callable(found):
        raise RunError(f"{flag} {name} is {type(found).__name__}, not a function.")
    return found
