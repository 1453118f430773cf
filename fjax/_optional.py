"""Packages that only some of fjax needs: imported late, with advice if missing."""

from importlib import import_module
from types import ModuleType


def import_optional(package: str, *, extra: str) -> ModuleType:
    """The package, or an ImportError that names the extra of fjax which brings it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(
            f"This needs {package}, which cannot be imported ({error}). Install it with `pip "
            f"install 'fjax[{extra}]'`."
        ) from error
