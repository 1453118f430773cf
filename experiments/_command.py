"""From a command line to a configuration to an exit status, with errors a person can act on."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import tyro
from rich.console import Console
from rich.markup import escape

from ._run_folder import RunError

ConfigT = TypeVar("ConfigT")


def run(config: type[ConfigT], main: Callable[[ConfigT], int], *, module: str) -> int:
    """Parses the command line and runs; what the user can put right is printed without a traceback."""
    try:
        chosen = tyro.cli(config, prog=f"python -m {module}", description=inspect.cleandoc(config.__doc__ or ""))
    except ValueError as error:  # of __post_init__: a value that its type allows and its meaning does not
        return _fail(error)
    if jax.default_backend() != "cpu":
        # Compiling for an accelerator takes minutes, and is the same every time.
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "fjax" / "compiled"))
    try:
        return main(chosen)
    except RunError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("Interrupted at once; what had been saved before is there for --resume.", file=sys.stderr)
        return 130


def _fail(error: Exception) -> int:
    Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return 2
