"""From a command line to a configuration to an exit status, with errors a person can act on."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from errno import ENOSPC
from pathlib import Path
from typing import TypeVar

import jax
from rich.console import Console
from rich.markup import escape

from fjax.hosts import abandon, connect, end_if_lost
from fjax.runs import RunError
from fjax.runs.endings import Interrupted, handled_by, interrupt, lasting_output
from fjax.runs.memory import keep_freed_memory
from fjax.runs.text import on_one_line

from .arguments import parse

ConfigT = TypeVar("ConfigT")

PROGRAM = "fjax" if __name__.startswith("fjax.") else "python -m experiments"
"""How commands are called, with their name behind it: from the installed package, or from a copy of
the repository."""


def called(name: str) -> list[str]:
    """What a person types for this process's command, its arguments included."""
    installed = PROGRAM == "fjax"
    start = ["fjax", name] if installed else ["python", "-m", f"experiments.{name}"]
    return [*start, *sys.argv[1:]]


LONGEST = 800
"""Characters of an error that are shown: those of a library may be a page of JSON."""


def run(
    config: type[ConfigT], main: Callable[[ConfigT], int], *, name: str, computes: bool = True
) -> int:
    """Parses the command line and runs; what the user can put right is printed without a traceback.

    Args:
        config: what can be set.
        main: does it; returns the exit status.
        name: what the command is called.
        computes: whether it takes an accelerator if there is one, rather than only reading and
            drawing what runs have left.
    """
    # What orbax logs of a failure, pages from each of its threads, it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with handled_by(interrupt), lasting_output():
        try:
            try:
                return _run(config, main, name, computes)
            finally:
                sys.stdout.flush()
        except Interrupted as signal:
            print(
                f"Interrupted at once ({signal}); what had been saved before, if anything, is "
                f"there for --resume.",
                file=sys.stderr,
            )
            return abandon(signal.status)
        except Exception as error:
            if not isinstance(error, RunError):
                end_if_lost()
            said = _sentence(error)
            if said is None:
                raise
            return abandon(_fail(said))


def _run(config: type[ConfigT], main: Callable[[ConfigT], int], name: str, computes: bool) -> int:
    try:
        chosen = parse(config, f"{PROGRAM} {name}")
    # of __post_init__: a value that its type allows and its meaning does not
    except ValueError as error:
        return _fail(str(error))
    _join(chosen)
    if computes:
        keep_freed_memory()
    kept = getattr(jax.config, "jax_compilation_cache_dir", None)
    if computes and _backend() != "cpu" and not kept:
        # Compiling for an accelerator takes minutes, and is the same every time.
        jax.config.update(
            "jax_compilation_cache_dir", str(Path.home() / ".cache" / "fjax" / "compiled")
        )
    return main(chosen)


def _join(chosen: object) -> None:
    """The other processes of the run, if there are any; before JAX computes anything."""
    settings = getattr(chosen, "settings", None)
    if settings is None or not settings.is_distributed:
        return
    try:
        connect(settings.coordinator, settings.processes, settings.process)
    except RuntimeError as error:
        raise RunError(str(error)) from error


def _backend() -> str:
    """What jax computes on; an accelerator that JAX_PLATFORMS names first must be there, whatever
    it names after it.

    Raises:
        RunError: if it is not.
    """
    asked = getattr(jax.config, "jax_platforms", None) or ""
    advice = "Mend driver or container, or ask for the CPU: JAX_PLATFORMS=cpu."
    try:
        found = jax.default_backend()
    # the latter without a word, of cuda without its plug-in
    except (RuntimeError, AssertionError) as error:
        raise RunError(
            f"JAX_PLATFORMS={asked} cannot be had: {str(error) or 'jax finds none'}. {advice}"
        ) from error
    first = asked.split(",")[0].strip()
    if found == "cpu" and first not in ("", "cpu"):
        raise RunError(f"JAX_PLATFORMS={asked} asks for {first}, of which jax finds none. {advice}")
    return found


def _sentence(error: BaseException) -> str | None:
    """What a person can put right: our own errors, a full disk or whatever else the system refuses;
    None for a bug."""
    if isinstance(error, RunError):
        return str(error)
    for cause in _causes(error):
        if isinstance(cause, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in str(cause):
            return (
                "There is not enough memory: take fewer --samples, or a smaller --microbatch-size "
                "or model."
            )
        ours = isinstance(cause, OSError) and cause.errno is None  # a sentence of the library's
        if os.strerror(ENOSPC) in str(cause):
            where = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
            said = str(cause).rstrip(".") if ours else f"{os.strerror(ENOSPC)}{where}"
            return f"{said}. Free some, and go on with --resume from what had been saved before."
        if isinstance(cause, OSError):
            return str(cause) if ours else f"{type(cause).__name__}: {cause}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _fail(said: str) -> int:
    said = on_one_line(said)
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]} …"
    Console(stderr=True).print(
        f"[bold red]Error:[/] {escape(said)}", highlight=False, soft_wrap=True
    )
    return 2
