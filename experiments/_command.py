"""From a command line to a configuration to an exit status, with errors a person can act on."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro
from rich.console import Console

from ._run_folder import RunError

ConfigT = TypeVar("ConfigT")


def run(config: type[ConfigT], main: Callable[[ConfigT], int]) -> int:
    """Parses the command line and runs; what the user can put right is printed without a traceback."""
    try:
        return main(tyro.cli(config))
    except (RunError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith("--"):
            raise
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
