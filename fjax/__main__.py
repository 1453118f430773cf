"""The command lines of fjax: fjax lexical_constraint --help."""

import sys
from importlib import import_module

from fjax._optional import import_optional


def main() -> int:
    """Runs the command that is named first; the exit status is the command's."""
    try:
        for package in ("tyro", "rich", "matplotlib", "flax"):
            import_optional(package, extra="runs")
    except ImportError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return _commands().main()


def _commands():
    """As they are installed; a copy of the repository has them beside the package."""
    try:
        return import_module("fjax.experiments.__main__")
    except ModuleNotFoundError as error:
        if error.name != "fjax.experiments":
            raise
        return import_module("experiments.__main__")


def program() -> None:
    """`main` as a process of its own."""
    status = main()
    if status > 128:  # of a signal, to a command that has all it needs installed
        import_module("fjax.runs.endings").leave(status)
    sys.exit(status)


if __name__ == "__main__":
    program()
